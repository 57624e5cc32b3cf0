"""JPEGs to measure on: generated ones the size of ImageNet's, the same everywhere, or the user's own."""

import functools
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from linerate.shards.errors import UserError

# Raised when the bytes that make_folder writes change, so that an old cache is not taken for the new set.
GENERATOR_VERSION = 1
NUM_CLASSES = 10
# ImageNet's photos: 456 x 395 pixels and 108,700 bytes in the mean, four in five of them 4:4:4.
SIZES = ((500, 375), (500, 375), (375, 500), (500, 333), (400, 400))
QUALITY = 92


@dataclass(frozen=True)
class ImageFolder:
    """A folder of class folders of JPEGs."""

    root: Path
    files: tuple[Path, ...]
    """sorted"""
    labels: tuple[int, ...]
    """place of the file's folder among the sorted folders"""
    num_bytes: int

    @property
    def mean_kb(self) -> int:
        """Mean size of a file in units of 1,000 bytes."""
        return round(self.num_bytes / len(self.files) / 1000)


def load_images(given: Path | None, *, num_images: int, num_bytes: int | None = None) -> ImageFolder:
    """Up to num_images of the given folder, or num_images generated ones, which are kept for the next call.

    num_bytes: the rough size of a generated file; ~110 KB where it is not given.
    Raises UserError where the folder holds no JPEG.
    """
    if given is not None:
        return list_folder(given, num_images=num_images)
    small = num_bytes is not None and num_bytes < 20_000
    kind = "small" if small else "photos"
    root = cache_folder() / f"{kind}-v{GENERATOR_VERSION}-{num_images}"
    if not root.is_dir():
        make_folder(root, num_images=num_images, small=small)
    return list_folder(root, num_images=num_images)


def cache_folder() -> Path:
    """Where generated images are kept; LINERATE_BENCH_CACHE moves it."""
    named = os.environ.get("LINERATE_BENCH_CACHE")
    if named:
        return Path(named)
    return Path(tempfile.gettempdir()) / f"linerate-bench-images-{os.getuid()}"


def list_folder(root: Path, *, num_images: int) -> ImageFolder:
    """The first num_images JPEGs below root, in sorted order. Raises UserError where there are none."""
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg") and p.is_file())
    if not found:
        raise UserError(f"{root} holds no .jpg or .jpeg file; give a folder of JPEGs, or leave --images out")
    # Every so many-th file, so that the pick covers all classes of a folder larger than it.
    step = max(1, len(found) // num_images)
    files = tuple(found[::step][:num_images])
    folders = {folder: i for i, folder in enumerate(sorted({path.parent for path in found}))}
    return ImageFolder(
        root=root,
        files=files,
        labels=tuple(folders[path.parent] for path in files),
        num_bytes=sum(path.stat().st_size for path in files),
    )


def copy_folder(images: ImageFolder, target: Path) -> ImageFolder:
    """The same files below `target` (on tmpfs, say), with the names of class folders kept."""
    for path in images.files:
        copied = target / path.relative_to(images.root)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)
    return list_folder(target, num_images=len(images.files))


def make_folder(root: Path, *, num_images: int, small: bool = False) -> None:
    """Write num_images JPEGs into ten class folders below root, the same bytes on every call.

    They appear all at once: a run that was stopped leaves no half set behind.
    """
    import simplejpeg

    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        for index in range(num_images):
            folder = unfinished / f"class{index % NUM_CLASSES:02d}"
            folder.mkdir(exist_ok=True)
            subsampling = "420" if index % 5 == 4 else "444"
            jpeg = simplejpeg.encode_jpeg(
                draw_photo(index, small=small), quality=QUALITY, colorsubsampling=subsampling
            )
            (folder / f"{index:06d}.jpg").write_bytes(jpeg)
        unfinished.rename(root)
    except OSError:
        # Another process may have finished the same set first.
        if not root.is_dir():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def draw_photo(index: int, *, small: bool = False) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8: a window of a noise field whose spectrum falls with frequency as photos' do."""
    generator = np.random.default_rng([GENERATOR_VERSION, index])
    width, height = (96, 72) if small else SIZES[index % len(SIZES)]
    field = _field()
    top = int(generator.integers(0, field.shape[0] - height))
    left = int(generator.integers(0, field.shape[1] - width))
    window = field[top : top + height, left : left + width]
    colours = generator.uniform(0.6, 1.4, size=(1, 1, 3)).astype(np.float32)
    light = float(generator.uniform(90, 165))
    pixels: npt.NDArray[np.uint8] = np.clip(light + 42 * window * colours, 0, 255).astype(np.uint8)
    return pixels


@functools.cache
def _field(side: int = 1536) -> npt.NDArray[np.float32]:
    """(side, side, 3) float32 of unit variance: three correlated fields of 1/f amplitude."""
    generator = np.random.default_rng(GENERATOR_VERSION)
    rows, columns = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :]
    falloff = 1 / np.maximum(np.hypot(rows, columns), 1 / side) ** 1.15
    planes = []
    for _ in range(4):
        spectrum = np.fft.rfft2(generator.standard_normal((side, side))) * falloff
        spectrum[0, 0] = 0
        plane = np.fft.irfft2(spectrum, s=(side, side))
        planes.append(plane / plane.std())
    shared, *own = planes
    return np.stack([0.9 * shared + 0.43 * plane for plane in own], axis=2).astype(np.float32)

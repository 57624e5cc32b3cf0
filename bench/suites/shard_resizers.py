"""Images shrunk for shards by Pillow + webdataset, and how far shrunk images lie from a peer's."""

import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from linerate.bench.contest import Disagreement
from linerate.bench.images import ImageFolder
from linerate.shards.catalog import Catalog
from linerate.shards.reencode import target_size


def shrink_with_pillow(jpeg: bytes, *, resize: int, quality: int) -> bytes:
    """Antialiased bilinear, as Pillow's and torchvision's resize."""
    from PIL import Image

    with Image.open(io.BytesIO(jpeg)) as opened:
        image = opened.convert("RGB")
    height, width = target_size(image.height, image.width, resize)
    out = io.BytesIO()
    image.resize((width, height), Image.Resampling.BILINEAR).save(out, "JPEG", quality=quality)
    return out.getvalue()


def write_shrunk(images: ImageFolder, out: Path, *, resize: int, quality: int) -> None:
    """Every image shrunk by Pillow into one tar of webdataset's ShardWriter."""
    import webdataset

    with webdataset.ShardWriter(
        os.fspath(out / "shard-%06d.tar"), maxcount=10**9, maxsize=10**12, verbose=0
    ) as writer:
        for index, (path, label) in enumerate(zip(images.files, images.labels, strict=True)):
            jpeg = shrink_with_pillow(path.read_bytes(), resize=resize, quality=quality)
            writer.write({"__key__": f"{index:012d}", "jpg": jpeg, "cls": label})


def require_alike(
    ours: Mapping[int, bytes], theirs: Mapping[int, bytes], *, least_db: float, worst_db: float
) -> str:
    """What was found equal. Raises Disagreement unless both hold the same images at the same sizes.

    Both map the place of the source's file to a JPEG. least_db: PSNR of all pixels of all images together;
    worst_db: of the worst image.
    """
    if ours.keys() != theirs.keys():
        raise Disagreement(f"ours holds {len(ours)} images, the peer {len(theirs)}, or not the same ones")
    errors, pixels, worst = 0.0, 0, float("inf")
    for place, jpeg in ours.items():
        a, b = _decoded(jpeg), _decoded(theirs[place])
        if a.shape != b.shape:
            raise Disagreement(f"image {place} has {a.shape[:2]} pixels, the peer's {b.shape[:2]}")
        squares = float(((a - b) ** 2).sum())
        errors, pixels, worst = errors + squares, pixels + a.size, min(worst, psnr(squares / a.size))
    total = psnr(errors / pixels)
    if total < least_db or worst < worst_db:
        raise Disagreement(
            f"the images lie {total:.1f} dB from the peer's, the worst one {worst:.1f}; "
            f"{least_db:g} and {worst_db:g} are needed"
        )
    return f"the size of every image; its pixels to {total:.1f} dB, the worst one to {worst:.1f}"


def psnr(mean_square: float) -> float:
    """Peak signal-to-noise ratio of 8-bit pixels, dB."""
    return 10 * float(np.log10(255**2 / mean_square)) if mean_square else float("inf")


def our_images(catalog: Catalog, images: ImageFolder) -> dict[int, bytes]:
    """Place of the source's file -> JPEG in the shards."""
    place = {os.fspath(path.relative_to(images.root)): i for i, path in enumerate(images.files)}
    found = {}
    for shard in range(catalog.num_shards):
        tar = catalog.shard_path(shard).read_bytes()
        for row in catalog.load_table(shard, ["key", "offset", "size"]).to_pylist():
            found[place[row["key"]]] = tar[row["offset"] : row["offset"] + row["size"]]
    return found


def their_images(folder: Path) -> dict[int, bytes]:
    """Place of the source's file, which is the peers' key -> JPEG in the tars."""
    found = {}
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg") and (data := tar.extractfile(member)):
                    found[int(member.name.partition(".")[0])] = data.read()
    return found


def _decoded(jpeg: bytes) -> npt.NDArray[np.float32]:
    from PIL import Image

    with Image.open(io.BytesIO(jpeg)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float32)

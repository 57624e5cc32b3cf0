"""The shards as one .beton file for ffcv: the same JPEG bytes, in the order of positions.

ffcv's writer waits for ever when one of its processes dies, and its process did not exit after larger
runs. So it works in a session of its own with a time limit, and every image is compared afterwards.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from PIL import Image

from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.inspect_image import CMYK, UNUSUAL_CODING
from linerate.shards.terminal import make_parent

MIN_PAGE_BYTES = 1 << 23
# ffcv decodes by libjpeg-turbo's plain interface, which turns neither CMYK nor lossless into RGB.
NEEDS_CONVERSION = CMYK | UNUSUAL_CODING
CONVERTED_QUALITY = 95
JPEG_MODE = 0  # ffcv's IMAGE_MODES["jpg"]


@dataclass(frozen=True)
class BetonReport:
    """What write_beton wrote."""

    path: Path
    num_samples: int
    num_bytes: int
    num_converted: int
    """Images that ffcv cannot decode as they are (CMYK, lossless), written anew as RGB JPEG."""


def default_time_limit_s(catalog: Catalog) -> float:
    """A minute, and a second for every 10 MB or 500 samples: several times what a slow disk needs."""
    return 60 + float(catalog.shard_bytes.sum()) / 10e6 + catalog.num_samples / 500


def write_beton(catalog: Catalog, path: Path, *, time_limit_s: float | None = None) -> BetonReport:
    """Write fields image (JPEG bytes), label and sample_id (integers); sample i is position i.

    Raises UserError without ffcv, when its writer fails or exceeds the limit, and when what it wrote
    differs; `path` is untouched then.
    """
    if importlib.util.find_spec("ffcv") is None:
        raise UserError(
            "`linerate shard beton` needs ffcv: apt-get install libturbojpeg0-dev libopencv-dev pkg-config, "
            "then pip install 'linerate[ffcv]'"
        )
    limit_s = default_time_limit_s(catalog) if time_limit_s is None else time_limit_s
    make_parent(path)
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _run_writer(catalog, temp, limit_s=limit_s)
        num_converted = check_beton(catalog, temp)
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)
    return BetonReport(path, catalog.num_samples, path.stat().st_size, num_converted)


def _run_writer(catalog: Catalog, temp: Path, *, limit_s: float) -> None:
    question = json.dumps({"root": os.fspath(catalog.root), "out": os.fspath(temp)})
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from linerate.shards.beton import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=log,
            # ffcv compiles its decoders when it is imported, seconds that a writer does not need.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "NUMBA_DISABLE_JIT": "1"},
            start_new_session=True,  # so that the processes it starts can be ended with it
        )
        try:
            process.communicate(question.encode(), timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise UserError(
                f"ffcv's writer was not done after {limit_s:.0f} s and was ended; raise --time-limit-s if "
                f"the disk is slow"
            ) from None
        finally:
            _end_session(process)
        if process.returncode:
            raise UserError(
                f"ffcv's writer failed: {_last_line(log)}; `linerate shard verify` the shards first"
            )


def _end_session(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin:
        process.stdin.close()


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"


class ShardImages:
    """Every sample of a catalog by position, as ffcv's writer asks for them."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._shard = -1
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return self._catalog.num_samples

    def close(self) -> None:
        """Close the shard that was read last."""
        if self._file:
            self._file.close()

    def __getitem__(self, position: int) -> tuple[EncodedImage, int, int]:
        shard = int(np.searchsorted(self._catalog.starts, position, side="right")) - 1
        if shard != self._shard:
            self.close()
            self._file = self._catalog.shard_path(shard).open("rb")
            table = self._catalog.load_table(shard)
            self._rows = {name: table.column(name).to_numpy() for name in table.column_names if name != "key"}
            self._shard = shard
        row = int(position - self._catalog.starts[shard])
        values = {name: int(column[row]) for name, column in self._rows.items()}
        assert self._file
        self._file.seek(values["offset"])
        jpeg = self._file.read(values["size"])
        if values["flags"] & NEEDS_CONVERSION:
            jpeg = _convert(jpeg)
        return EncodedImage(jpeg, values["height"], values["width"]), values["label"], values["sample_id"]


@dataclass(frozen=True)
class EncodedImage:
    """A JPEG and its dimensions."""

    jpeg: bytes
    height: int
    width: int


def _convert(jpeg: bytes) -> bytes:
    out = io.BytesIO()
    with Image.open(io.BytesIO(jpeg)) as image:
        image.convert("RGB").save(out, "JPEG", quality=CONVERTED_QUALITY)
    return out.getvalue()


def _encode(field: Any, destination: Any, image: EncodedImage, malloc: Any) -> None:
    """In place of RGBImageField.encode, which would decode and encode anew."""
    destination["mode"] = JPEG_MODE
    destination["height"], destination["width"] = image.height, image.width
    destination["data_ptr"], storage = malloc(len(image.jpeg))
    storage[:] = np.frombuffer(image.jpeg, np.uint8)


def serve() -> None:
    """The writing process: a question on stdin, a file, an exit code."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    question = json.load(sys.stdin)
    catalog = Catalog.load(question["root"])
    image = RGBImageField(write_mode="jpg")
    # Not a subclass: the file names a field's type by its exact class.
    image.encode = types.MethodType(_encode, image)
    page = max(MIN_PAGE_BYTES, 1 << (2 * catalog.max_sample_bytes - 1).bit_length())
    fields = {"image": image, "label": IntField(), "sample_id": IntField()}
    # One worker: more of them lay the samples out in another order each time.
    writer = DatasetWriter(question["out"], fields, page_size=page, num_workers=1)
    writer.from_indexed_dataset(ShardImages(catalog))
    os._exit(0)  # its own processes are ended by the supervisor; waiting for them takes for ever


# The file: a header, a row per field, a row per sample, the data, a row per stretch of data.
_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("table", "<u8"),
    ],
    align=True,
)
_FIELD = np.dtype([("type", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("start", "<u8")])
_SAMPLE = np.dtype([("image", _IMAGE), ("label", "<i8"), ("sample_id", "<i8")], align=True)
_STRETCH = np.dtype([("sample", "<u8"), ("start", "<u8"), ("size", "<u8")])


def count_samples(path: Path) -> int:
    """How many samples the header of a .beton promises; 0 where the file is cut short."""
    header = np.fromfile(path, _HEADER, count=1)
    return int(header["num_samples"][0]) if len(header) and int(header["table"][0]) else 0


def check_beton(catalog: Catalog, path: Path) -> int:
    """The number of converted images, after comparing every sample of the file with the shards.

    Raises UserError for the first one that differs.
    """
    header = np.fromfile(path, _HEADER, count=1)
    num_samples = count_samples(path)
    if num_samples != catalog.num_samples:
        raise UserError(f"ffcv wrote {num_samples} of {catalog.num_samples} samples; try again")
    start = _HEADER.itemsize + int(header["num_fields"][0]) * _FIELD.itemsize
    samples = np.fromfile(path, _SAMPLE, count=num_samples, offset=start)
    stretches = np.fromfile(path, _STRETCH, offset=int(header["table"][0]))
    sizes = dict(zip(stretches["start"].tolist(), stretches["size"].tolist(), strict=True))
    num_converted = 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for shard in range(catalog.num_shards):
            rows = catalog.load_table(shard).to_pylist()
            for row, sample in zip(rows, samples[catalog.starts[shard] :], strict=False):
                at = int(sample["image"]["start"])
                num_converted += _check_sample(row, sample, data[at : at + sizes.get(at, 0)], catalog)
    return num_converted


def _check_sample(row: dict[str, Any], sample: Any, jpeg: bytes, catalog: Catalog) -> bool:
    """Was this sample converted? Raises UserError when it differs otherwise."""
    converted = bool(row["flags"] & NEEDS_CONVERSION)
    same = jpeg[:2] == b"\xff\xd8" if converted else xxhash.xxh3_64_intdigest(jpeg) == row["xxh3_64"]
    stored = (sample["image"]["height"], sample["image"]["width"], sample["label"], sample["sample_id"])
    if not same or stored != (row["height"], row["width"], row["label"], row["sample_id"]):
        raise UserError(
            f"ffcv wrote something else for sample {row['sample_id']} ({row['key']}); "
            f"`linerate shard verify {catalog.root}`, then try again"
        )
    return converted

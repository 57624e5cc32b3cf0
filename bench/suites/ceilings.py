"""What this machine can do at most: memory, arithmetic, disk, the way to a GPU, JPEGs."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from linerate.bench.ceilings import copy_of, matmul_of
from linerate.bench.contest import Contest, Setting, missing_record
from linerate.bench.disk import disk_kind, disk_sides, scratch_file
from linerate.bench.images import ImageFolder, copy_folder, load_images
from linerate.bench.record import Record
from linerate.bench.suites.view_work import missing_backend
from linerate.bench.suites.views import Work, decode_only, encoded_batches
from linerate.bench.timing import Side, one_core
from linerate.pipeline.cores import usable_cores
from linerate.pipeline.recipe import find_recipe

NAME = "ceilings"
NO_GPU = "not measured, there is no CUDA device"


def bench_ceilings(setting: Setting) -> Iterator[Contest | Record]:
    """One record for each thing that a result can be a share of."""
    yield from _memory(setting)
    yield from _arithmetic(setting)
    yield from _to_device(setting)
    yield from _disk(setting)
    images = copy_folder(
        load_images(setting.images, num_images=setting.pick(tiny=4, quick=32, full=256)),
        setting.scratch / "ceilings-images",
    )
    yield _cat(setting, images)
    yield from _decode(setting, images)


def _memory(setting: Setting) -> Iterator[Contest]:
    num_bytes = setting.pick(tiny=2**16, quick=64 * 2**20, full=256 * 2**20)
    places: list[tuple[str, str, contextlib.AbstractContextManager[None]]] = [
        ("cpu", "one core", one_core()),
        ("cpu", "all cores", _all_threads()),
    ]
    if setting.device == "cuda":
        places.append(("cuda", "on the GPU", contextlib.nullcontext()))
    for device, where, held in places:
        with held:
            copied = 4 * num_bytes if device == "cuda" else num_bytes
            copy = copy_of(device, copied)
            yield _ceiling(
                f"memory copy, {where}: {copied:,} bytes, read and written", "GB/s", copy.amount, copy.side
            )


def _arithmetic(setting: Setting) -> Iterator[Contest]:
    device = setting.device
    size = setting.pick(tiny=64, quick=1024, full=2048) if device == "cpu" else 8192
    for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        with _all_threads():
            product = matmul_of(device, dtype, size)
            where = "all cores" if device == "cpu" else "on the GPU"
            yield _ceiling(
                f"{short} matmul, {where}: {size} x {size}, by itself",
                "TFLOP/s",
                product.amount,
                product.side,
            )


def _to_device(setting: Setting) -> Iterator[Contest | Record]:
    num_bytes = setting.pick(tiny=2**16, quick=64 * 2**20, full=256 * 2**20)
    work = f"pinned host to GPU: {num_bytes:,} bytes"
    if setting.device != "cuda":
        yield _missing(work, "GB/s", NO_GPU)
        return
    host = torch.ones(num_bytes, dtype=torch.uint8).pin_memory()
    target = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    side = Side(run=lambda: target.copy_(host, non_blocking=True))
    yield _ceiling(work, "GB/s", num_bytes / 1e9, side)


def _disk(setting: Setting) -> Iterator[Contest | Record]:
    num_bytes = setting.pick(tiny=2**20, quick=64 * 2**20, full=512 * 2**20)
    kind = disk_kind(setting.scratch)
    about = {
        "write": f"write, {kind}: {num_bytes:,} bytes and fdatasync",
        "read": f"read, {kind}: {num_bytes:,} bytes that the page cache was told to forget",
    }
    with scratch_file(setting.scratch, num_bytes) as path:
        if path is None:
            for work in about.values():
                yield _missing(work, "MB/s", "the scratch folder has no room for four times as much")
            return
        for way, side in disk_sides(path, num_bytes).items():
            yield _ceiling(about[way], "MB/s", num_bytes / 1e6, side)


def _cat(setting: Setting, images: ImageFolder) -> Contest:
    listed = b"\0".join(os.fsencode(path) for path in images.files)
    joined = setting.scratch / "joined"

    def cat() -> None:
        with joined.open("wb") as out:
            subprocess.run(["xargs", "-0", "cat", "--"], input=listed, stdout=out, check=True)

    return _ceiling(
        f"cat, {disk_kind(setting.scratch)}: {len(images.files)} files of {images.mean_kb} KB into one",
        "MB/s",
        images.num_bytes / 1e6,
        Side(run=cat, prepare=lambda: joined.unlink(missing_ok=True)),
    )


def _decode(setting: Setting, images: ImageFolder) -> Iterator[Contest | Record]:
    batches = encoded_batches(images, setting.pick(tiny=2, quick=16, full=64))
    work = Work(find_recipe("v2"), batches, images.mean_kb)
    images_of = f"{work.num_images} images of {images.mean_kb} KB"
    with one_core():
        side = Side(run=partial(decode_only, work))
        yield _ceiling(f"JPEG decode, simplejpeg, one core: {images_of}", "images/s", work.num_images, side)
    places: list[dict[str, Any]] = [{"device": "cpu", "num_threads": usable_cores()}]
    named = [f"JPEG decode, DALI, {where}: {images_of}" for where in ("all cores", "hw_decoder_load=1")]
    if setting.device == "cuda":
        places.append({"device": "cuda", "num_threads": usable_cores(), "hw_decoder_load": 1.0})
    else:
        yield _missing(named[1], "images/s", NO_GPU)
    if lacking := missing_backend("dali"):
        yield _missing(named[0], "images/s", lacking)
        return
    for where, place in zip(named, places, strict=False):
        with contextlib.closing(_Decoder(batches, **place)) as decoder:
            yield _ceiling(where, "images/s", work.num_images, Side(run=decoder.run))


class _Decoder:
    """DALI's decoder over the same batches again and again; building it is not in the time."""

    def __init__(self, batches: list[Any], **place: Any) -> None:
        from linerate.pipeline.dali_views import decoded

        def endless() -> Iterator[Any]:
            while True:
                yield from (batch.jpegs for batch in batches)

        self._num = len(batches)
        self._images = decoded(endless(), batch=len(batches[0].jpegs), **place)

    def run(self) -> None:
        """As many batches as there are."""
        for _ in range(self._num):
            next(self._images)

    def close(self) -> None:
        self._images = iter(())


@contextlib.contextmanager
def _all_threads() -> Iterator[None]:
    """torch with a thread on every core that may be used."""
    threads = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _ceiling(work: str, unit: str, amount: float, side: Side) -> Contest:
    return Contest(
        peer=None, work=work, unit=unit, amount=amount, ours=side, no_ceiling="it is a ceiling itself"
    )


def _missing(work: str, unit: str, why: str) -> Record:
    return missing_record(
        NAME, _ceiling(work, unit, 1, Side(run=lambda: None)), missing=f"{work.partition(':')[0]}: {why}"
    )

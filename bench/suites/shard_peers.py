"""What shards are held against: webdataset's writer and reader, Pillow's check, and bare copies of bytes."""

import collections
import io
import itertools
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import xxhash

from linerate.bench.contest import Disagreement
from linerate.bench.images import ImageFolder
from linerate.shards.tar_writer import BUFFER_BYTES


def require_same_samples(
    ours: Sequence[tuple[bytes, int]], theirs: Sequence[tuple[bytes, int]], *, may_leave_out: int = 0
) -> str:
    """What was found equal. Raises Disagreement unless both hold the same (JPEG bytes, label), in any order.

    may_leave_out: as many of theirs may be absent from ours (the rest of an epoch that fills no batch).
    """
    counts = [
        collections.Counter((xxhash.xxh3_64_intdigest(jpeg), label) for jpeg, label in side)
        for side in (ours, theirs)
    ]
    added, left_out = (counts[0] - counts[1]).total(), (counts[1] - counts[0]).total()
    if added or left_out != may_leave_out:
        raise Disagreement(
            f"of {len(theirs)} samples ours lacks {left_out} (it may lack {may_leave_out}) "
            f"and has {added} that the peer has not"
        )
    return "bytes and label of every sample"


def write_with_webdataset(
    images: ImageFolder, out: Path, *, check: Callable[[bytes], object] | None = None
) -> None:
    import webdataset

    with webdataset.ShardWriter(
        os.fspath(out / "shard-%06d.tar"), maxcount=10**9, maxsize=10**12, verbose=0
    ) as writer:
        for index, (path, label) in enumerate(zip(images.files, images.labels, strict=True)):
            jpeg = path.read_bytes()
            if check is not None:
                check(jpeg)
            writer.write({"__key__": f"{index:012d}", "jpg": jpeg, "cls": label})


def load_with_pillow(jpeg: bytes) -> object:
    from PIL import Image

    return Image.open(io.BytesIO(jpeg)).load()


def iterate_webdataset(urls: list[str]) -> Iterator[tuple[bytes, int]]:
    """(JPEG bytes, label) of every sample, shuffled by shard and through a buffer."""
    import webdataset

    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False).shuffle(1000)
    for sample in dataset:
        yield sample["jpg"], int(sample["cls"])


def batched(samples: Iterator[tuple[bytes, int]], size: int) -> Iterator[list[tuple[bytes, int]]]:
    while batch := list(itertools.islice(samples, size)):
        yield batch


def tar_samples(folder: Path) -> list[tuple[bytes, int]]:
    """(JPEG bytes, label) of all tars of a folder, by Python's own tarfile."""
    jpegs: dict[str, bytes] = {}
    labels: dict[str, int] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                stem, _, kind = member.name.partition(".")
                data = tar.extractfile(member)
                assert data is not None
                if kind == "jpg":
                    jpegs[stem] = data.read()
                elif kind == "cls":
                    labels[stem] = int(data.read())
    return [(jpeg, labels.get(stem, -1)) for stem, jpeg in jpegs.items()]


def pread_all(where: list[tuple[Path, list[int], list[int]]]) -> None:
    buffer = memoryview(bytearray(max(max(sizes) for _, _, sizes in where)))
    for path, offsets, sizes in where:
        fd = os.open(path, os.O_RDONLY)
        try:
            for offset, size in zip(offsets, sizes, strict=True):
                os.preadv(fd, [buffer[:size]], offset)
        finally:
            os.close(fd)


def copy_and_hash(images: ImageFolder, out: Path) -> None:
    """Open, read, hash twice and write: a Python loop of nothing but what the packer's work consists of."""
    buffer = memoryview(bytearray(BUFFER_BYTES))
    whole = xxhash.xxh3_64()
    with out.open("wb", buffering=0) as target:
        fill = 0
        for path in images.files:
            source = os.open(path, os.O_RDONLY)
            size = os.fstat(source).st_size
            if fill + size > len(buffer):
                whole.update(buffer[:fill])
                target.write(buffer[:fill])
                fill = 0
                if size > len(buffer):
                    buffer = memoryview(bytearray(size))
            read = os.readv(source, (buffer[fill : fill + size],))
            os.close(source)
            xxhash.xxh3_64_intdigest(buffer[fill : fill + read])
            fill += read
        whole.update(buffer[:fill])
        target.write(buffer[:fill])

"""One task of reading remote tars: a run of them, front to back, once.

What lists a tar (headers, `.cls`, `.json`, `.txt`) is written to a skeleton: a sparse file of the tar's size
in which the images are holes, so that it lists as the tar would. The images themselves are appended to one
part for every bucket, as spill_task does with tars on disk; here the bucket follows from the key alone,
because the plan that it could follow from is made of what is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from linerate.shards.errors import UserError
from linerate.shards.fetch_options import FetchOptions
from linerate.shards.remote_stream import RemoteFile, stream
from linerate.shards.remote_url import show_url
from linerate.shards.sources import MAX_JSON_BYTES, display_name, judge_name
from linerate.shards.spill_layout import part_path
from linerate.shards.spill_task import Part, finish_parts
from linerate.shards.tar_reader import BLOCK, Member, begins_tar, walk_members

SKELETONS_NAME = "skeletons"
_LISTED = (".cls", ".json", ".txt")
_REPORT_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class RemoteTar:
    """One of the tars of a source."""

    file: RemoteFile
    prefix: str
    """Of its members' keys."""
    start: int
    """Where it begins when all tars are laid end to end."""
    number: int


@dataclass(frozen=True, kw_only=True)
class RemoteTarTask:
    """The tars of one piece."""

    folder: str
    piece: int
    buckets: tuple[int, ...]
    """Those that are still missing, of num_buckets."""
    num_buckets: int
    tars: tuple[RemoteTar, ...]
    seed: int
    options: FetchOptions


def skeleton_path(folder: Path, number: int) -> Path:
    return folder / SKELETONS_NAME / f"{number:06d}.tar"


def bucket_of_key(key: str, *, seed: int, num_buckets: int) -> int:
    """The plan sorts by the same hash, so the shards of a bucket are neighbours."""
    place = int.from_bytes(hashlib.md5(f"{seed}:{key}".encode()).digest()[8:], "little")
    return place * num_buckets >> 64


def run_task(task: RemoteTarTask, report: Callable[[int], None]) -> Callable[[], None]:
    """Read the tars of a piece; sync and names of what was written in the callable that comes back."""
    folder = Path(task.folder)
    with contextlib.ExitStack() as on_error:
        parts: list[Part | None] = [None] * task.num_buckets
        for bucket in task.buckets:
            parts[bucket] = part = Part(part_path(folder, bucket, task.piece))
            on_error.callback(part.discard)
        for tar in task.tars:
            _read_tar(folder, tar, parts, task, report)
        on_error.pop_all()
    return lambda: finish_parts([part for part in parts if part])


def _read_tar(
    folder: Path,
    tar: RemoteTar,
    parts: list[Part | None],
    task: RemoteTarTask,
    report: Callable[[int], None],
) -> None:
    path = skeleton_path(folder, tar.number)
    path.parent.mkdir(exist_ok=True)
    temp = path.with_suffix(f".{os.getpid()}.tmp")
    told = 0

    def keep(key: str, member: Member) -> None:
        nonlocal told
        part = parts[bucket_of_key(key, seed=task.seed, num_buckets=task.num_buckets)]
        if part:
            part.append_chunks(tar.start + member.offset, source.chunks_of(member))
        if member.offset - told >= _REPORT_BYTES:
            report(member.offset - told)
            told = member.offset

    try:
        with temp.open("wb") as skeleton, contextlib.closing(stream(tar.file, task.options)) as chunks:
            source = ForwardReader(chunks, tar.file, skeleton.fileno())
            if not begins_tar(source.pread(BLOCK, 0)):
                raise UserError(
                    f"the source {show_url(tar.file.url)} is no uncompressed tar; a .tar.gz or .zip is read "
                    f"from start to end only, unpack it first"
                )
            _read_members(source, tar, tar.prefix, None, keep)
            skeleton.truncate(tar.file.size)
        report(tar.file.size - told)
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)


def _read_members(
    source: ForwardReader,
    tar: RemoteTar,
    prefix: str,
    within: Member | None,
    keep: Callable[[str, Member], None],
) -> None:
    """Give `keep` every member that may be an image; TarSource says later which are, by the skeleton."""
    for member in walk_members(source, show_url(tar.file.url), size=tar.file.size, within=within):
        if not isinstance(member, Member):
            continue
        name = display_name(member.name)
        if name.endswith(".tar"):
            inside = within is None and not name.rpartition("/")[2].startswith(".")
            if inside and begins_tar(source.pread(min(BLOCK, member.size), member.offset)):
                _read_members(source, tar, f"{prefix}{name.removesuffix('.tar')}/", member, keep)
        elif name.lower().endswith(_LISTED):
            if member.size <= MAX_JSON_BYTES:  # of a longer one nothing but its size is asked
                source.pread(member.size, member.offset)
        elif judge_name(name, member.size) is None:
            keep(prefix + name, member)


class ForwardReader:
    """A stream as walk_members reads; what is read, not what is passed over, is written to the skeleton."""

    def __init__(self, chunks: Iterator[bytes], file: RemoteFile, skeleton: int) -> None:
        self._chunks = chunks
        self._file = file
        self._skeleton = skeleton
        self._held = bytearray()
        self._at = 0  # of the first byte that is held

    def pread(self, size: int, offset: int) -> bytes:
        self._pass_over(offset)
        while len(self._held) < size and (more := next(self._chunks, b"")):
            self._held += more
        data = bytes(self._held[:size])
        os.pwrite(self._skeleton, data, offset)
        return data

    def chunks_of(self, member: Member) -> Iterator[memoryview]:
        """The bytes of a member, which are not held longer than they are asked for."""
        self._pass_over(member.offset)
        left = member.size
        while left and (self._held or self._fill()):
            chunk = memoryview(self._held[:left])
            del self._held[: len(chunk)]
            self._at += len(chunk)
            left -= len(chunk)
            yield chunk

    def _pass_over(self, offset: int) -> None:
        assert offset >= self._at, "a stream goes forward only"
        while self._at + len(self._held) < offset:
            self._at += len(self._held)
            self._held.clear()
            if not self._fill():
                return
        del self._held[: offset - self._at]
        self._at = offset

    def _fill(self) -> bool:
        self._held += (more := next(self._chunks, b""))
        return bool(more)

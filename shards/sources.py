"""Where samples come from: every source lists rows of (key, where its bytes are, label, metadata)."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from linerate.shards.errors import UserError

# Files with these names are never samples; all others are judged by their bytes when packing.
# fmt: off
NOT_IMAGES = frozenset([
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".rst", ".html", ".htm",
    ".pdf", ".db", ".ini", ".log", ".py", ".ipynb", ".sh", ".mat", ".npy", ".npz", ".pkl", ".pt",
    ".pth", ".parquet", ".tar", ".gz", ".tgz", ".zip", ".bz2", ".xz", ".7z", ".zst", ".idx", ".mp4",
    ".mov", ".avi", ".mp3", ".wav",
])
# fmt: on
MAX_JSON_BYTES = 1 << 20
MAX_WRAPPERS = 8
MAX_SAMPLE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One sample of a source: where its bytes lie and what is known without reading them."""

    key: str
    """Its name in the source, as people and rejected.parquet call it; unique in the source."""
    path: bytes
    """Of the file, relative to its container; empty where the container itself is read in place."""
    container: int
    """Index into the source's containers."""
    offset: int
    """Of the first byte, or 0 for a file of its own."""
    size: int
    """Bytes."""
    label_name: str | None = None
    """Name of the class; classes are numbered in the order of their names."""
    label: int = -1
    """Number of the class where the source says it itself."""
    extra_json: bytes | None = None
    """Metadata that travels into the shard's .json member."""


@dataclass(frozen=True, slots=True)
class SourceReject:
    """Something in the source that cannot be a sample, seen without reading it."""

    key: str
    size: int
    reason: str
    detail: str = ""


class Source(Protocol):
    """A set of samples that can be listed, twice with the same result while nobody changes it."""

    @property
    def containers(self) -> Sequence[Path | str]:
        """What SourceRow.container counts: folders that hold files, and tars that are read in place.

        A text is the URL of a tar.
        """
        ...

    def rows(self) -> Iterator[SourceRow | SourceReject]:
        """List every sample, and everything that is none, in a fixed order."""
        ...


def container_name(container: Path | str) -> str:
    """Its absolute path, or its URL as it is."""
    return container if isinstance(container, str) else os.fspath(container.absolute())


@dataclass(frozen=True)
class FolderSource:
    """The files under a folder. Class folders become labels, loose files at the top have none."""

    root: Path

    @property
    def containers(self) -> list[Path]:
        return [self.root]

    def rows(self) -> Iterator[SourceRow | SourceReject]:
        base = self._class_level()
        depth = len(base)
        for path, size, problem in walk_files(self.root):
            parts = path.split(b"/")
            key = display_name(path)
            if problem:
                yield SourceReject(key, size, *problem)
            elif reject := judge_name(key, size):
                yield reject
            else:
                labelled = len(parts) > depth + 1 and parts[:depth] == base
                label_name = display_name(parts[depth]) if labelled else None
                yield SourceRow(key, path, 0, 0, size, label_name)

    def _class_level(self) -> list[bytes]:
        """The folders to step through before class folders begin: each holds one folder and no file."""
        base: list[bytes] = []
        while len(base) < MAX_WRAPPERS:  # a link may lead back up for ever
            here = os.path.join(os.fsencode(self.root), *base)  # noqa: PTH118  (bytes, as the names may not be UTF-8)
            entries = [e for e in _scan(here) if not e.name.startswith(b".")]
            if len(entries) != 1 or not entries[0].is_dir():
                return base
            inner = _scan(os.path.join(here, entries[0].name))  # noqa: PTH118
            if not any(entry.is_dir() for entry in inner):
                return base
            base.append(entries[0].name)
        return base


def walk_files(root: Path) -> Iterator[tuple[bytes, int, tuple[str, str] | None]]:
    """(path relative to root, bytes, problem) of everything under root that is no folder, in byte order.

    Links are followed, a folder that is its own ancestor is not entered again; pipes and devices are
    reported as a problem and never opened.
    """
    yield from _walk(os.fsencode(root), b"", frozenset())


def _walk(
    root: bytes, prefix: bytes, above: frozenset[tuple[int, int]]
) -> Iterator[tuple[bytes, int, tuple[str, str] | None]]:
    folder = root + b"/" + prefix if prefix else root
    try:
        info = os.stat(folder)  # noqa: PTH116
        entries = sorted(_scan(folder), key=lambda entry: entry.name)
    except PermissionError as error:
        yield prefix, 0, ("unreadable", error.strerror or "no permission")
        return
    if (info.st_dev, info.st_ino) in above:
        yield prefix, 0, ("not a regular file", "a link to a folder that holds it")
        return
    above |= {(info.st_dev, info.st_ino)}
    for entry in entries:
        path = prefix + b"/" + entry.name if prefix else entry.name
        if entry.name.startswith(b"."):
            yield path, 0, ("hidden", "its name begins with a dot")
            continue
        try:
            info = entry.stat()
        except OSError as error:
            yield path, 0, ("unreadable", error.strerror or "")
            continue
        if stat.S_ISDIR(info.st_mode):
            yield from _walk(root, path, above)
        elif stat.S_ISREG(info.st_mode):
            yield path, info.st_size, None
        else:
            yield path, 0, ("not a regular file", _kind(info.st_mode))


def _scan(folder: bytes) -> list[os.DirEntry[bytes]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _kind(mode: int) -> str:
    for test, name in ((stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"), (stat.S_ISCHR, "device")):
        if test(mode):
            return name
    return "special file"


def judge_name(key: str, size: int) -> SourceReject | None:
    """The reject for a file whose name or size rules it out before it is read."""
    suffix = os.path.splitext(key)[1].lower()  # noqa: PTH122
    if suffix in NOT_IMAGES:
        return SourceReject(key, size, "not an image", f"a {suffix} file by its name")
    if size > MAX_SAMPLE_BYTES:
        return SourceReject(key, size, "too many bytes", f"{size} exceeds {MAX_SAMPLE_BYTES}")
    return None


def display_name(path: bytes) -> str:
    """A path as UTF-8 text; bytes that are none become \\xNN."""
    return path.decode("utf-8", "backslashreplace")


def open_source(paths: Sequence[Path | str]) -> Source:
    """The source that these paths make: one folder, or one or several tars.

    Raises UserError for what is missing, empty, compressed or of another kind.
    """
    from linerate.shards.tar_reader import is_tar
    from linerate.shards.tar_source import TarSource

    given = [Path(path) for path in paths]
    for path in given:
        if not path.exists():
            raise UserError(f"the source {path} does not exist; give a folder of images or a tar of one")
    if len(given) == 1 and given[0].is_dir():
        inside = [entry for entry in _scan(os.fsencode(given[0])) if not entry.name.startswith(b".")]
        if not inside:
            raise UserError(f"the source {given[0]} is empty; give a folder of images or a tar of one")
        tars = sorted(Path(os.fsdecode(e.path)) for e in inside if e.name.endswith(b".tar") and e.is_file())
        others = [
            e for e in inside if not e.name.endswith((b".tar", b".idx", b".json", b".txt", b".parquet"))
        ]
        return TarSource(tars) if tars and not others else FolderSource(given[0])
    for path in given:
        if path.is_dir():
            raise UserError(f"{path} is a folder among {len(given)} sources; give one folder, or only tars")
        if not is_tar(path):
            raise UserError(
                f"the source {path} is neither a folder nor an uncompressed tar; a .tar.gz or .zip is read "
                f"from start to end only, unpack it first"
            )
    return TarSource(sorted(given))

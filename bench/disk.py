"""How fast the scratch folder's disk writes and reads, for the machine's record."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from linerate.bench.timing import Side

CHUNK = 4 * 2**20
NUM_BYTES = {"quick": 64 * 2**20, "full": 512 * 2**20}
# Of each direction, of a disk that is so slow.
LIMIT_S = 1.0
NAME = "disk.json"
# File systems that keep what they hold in memory.
IN_MEMORY = ("tmpfs", "ramfs")


def disk_record(folder: Path, *, num_bytes: int) -> dict[str, Any]:
    """Kind of the folder's disk, and its rates in MB/s; measured once, also for folders inside this one.

    Written with an fdatasync at the end; read after the page cache was told to forget it. In memory nothing
    can be forgotten, so there the rates are those of memory and system calls.
    """
    noted = folder.parent / NAME
    if noted.is_file():
        found: dict[str, Any] = json.loads(noted.read_text(encoding="utf-8"))
        return found
    with scratch_file(folder, num_bytes) as path:
        if path is None:
            return {"kind": disk_kind(folder), "write_mb_per_s": None, "read_mb_per_s": None}
        written, write_s = write_file(path, num_bytes, limit_s=LIMIT_S)
        forget(path)
        read, read_s = read_file(path, limit_s=LIMIT_S)
    record = {
        "kind": disk_kind(folder),
        "write_mb_per_s": round(written / 1e6 / write_s),
        "read_mb_per_s": round(read / 1e6 / read_s),
    }
    (folder / NAME).write_text(json.dumps(record), encoding="utf-8")
    return record


def disk_kind(folder: Path) -> str:
    """`memory` for tmpfs and the like, else `disk`, with the file system's name behind."""
    place, kind = folder.resolve(), "unknown"
    longest = -1
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
            _, mounted, file_system, *_ = line.split(" ")
            root = Path(mounted.encode().decode("unicode_escape"))
            # The last of several at one place hides those before it.
            if place.is_relative_to(root) and len(root.parts) >= longest:
                longest, kind = len(root.parts), file_system
    return f"{'memory' if kind in IN_MEMORY else 'disk'} ({kind})"


@contextlib.contextmanager
def scratch_file(folder: Path, num_bytes: int) -> Iterator[Path | None]:
    """A path to write to, removed at the end; None where there is no room for four times as much."""
    if shutil.disk_usage(folder).free < 4 * num_bytes:
        yield None
        return
    path = folder / "disk-rate"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def write_file(path: Path, num_bytes: int, *, limit_s: float = float("inf")) -> tuple[int, float]:
    """(bytes, seconds) of writing and syncing; no chunk starts after the limit."""
    # Not zeros, which some disks do not store.
    chunk = os.urandom(CHUNK)
    written, start = 0, time.perf_counter()
    with path.open("wb", buffering=0) as file:
        while written < num_bytes and time.perf_counter() - start < limit_s:
            written += file.write(chunk[: num_bytes - written])
        os.fdatasync(file.fileno())
    return written, time.perf_counter() - start


def forget(path: Path) -> None:
    """Tell the page cache to drop the file, which must be synced."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_file(path: Path, *, limit_s: float = float("inf")) -> tuple[int, float]:
    """(bytes, seconds) of reading from the start; no chunk starts after the limit."""
    buffer = bytearray(CHUNK)
    read, start = 0, time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while time.perf_counter() - start < limit_s and (num := file.readinto(buffer)):
            read += num
    return read, time.perf_counter() - start


def disk_sides(path: Path, num_bytes: int) -> dict[str, Side]:
    """Writing and reading of a file as the clock may time them; the file stays."""
    write_file(path, num_bytes)
    return {
        "write": Side(run=lambda: write_file(path, num_bytes), prepare=lambda: path.unlink(missing_ok=True)),
        "read": Side(run=lambda: read_file(path), prepare=lambda: forget(path)),
    }

"""Shards from elsewhere on the local disk: whole files, on demand, the least recently used of them leave.

`<cache-dir>/NAME-DIGEST/` looks like a folder that `linerate shard pack` wrote, whose tars and indexes come
when they are opened. DIGEST is of the URL and of the catalog's two files, so a set that changed gets a folder
of its own and never mixes with what it was. Many processes, of one job or of several, share a cache-dir:

- A file in the making is `.NAME.BYTES.part`. Who holds its flock downloads it, the others wait; the kernel
  frees the lock of a dead process, and the next one goes on at the byte that it reached.
- Who may still read a tar holds a shared flock on it. What evicts takes the files that nobody holds, the
  one used longest ago first: a file's mtime is when it was last opened. `<cache-dir>/.lock` serialises that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from xxhash import xxh3_64, xxh3_64_hexdigest

from linerate.pipeline.remote_shards import RemoteError, RemoteFolder, is_url
from linerate.shards.catalog import CATALOG_NAME, SHARDS_NAME, Catalog
from linerate.shards.errors import UserError, show_bytes

REMOTE_NAME = "remote.json"
TAR, INDEX = ".tar", ".parquet"
_CHUNK_BYTES = 8 * 2**20
_DISK_IS_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_log = logging.getLogger("linerate.cache")


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """How shards that --shards names by a URL are kept on this machine."""

    cache_dir: Path | None = None
    """For shards by URL: the folder that keeps them here, on a local disk; by default ~/.cache/linerate.
    The jobs of one user may share it."""
    cache_bytes: str = "100GB"
    """What all shards in --cache-dir may take together; those used longest ago are removed."""
    timeout_s: float = 30.0
    """Seconds that one answer of the server, 8 MiB at most, may take before it is asked again."""

    def __post_init__(self) -> None:
        if parse_size(self.cache_bytes, flag="--cache-bytes") < 1:
            raise UserError(f"--cache-bytes {self.cache_bytes} keeps nothing; give a size such as 200GB")
        if not self.timeout_s > 0:
            raise UserError(f"--timeout-s {self.timeout_s:g} must be more than 0, as 30")

    @property
    def options(self) -> CacheOptions:
        """These fields alone, where a subclass has more."""
        return CacheOptions(cache_dir=self.cache_dir, cache_bytes=self.cache_bytes, timeout_s=self.timeout_s)


def parse_size(text: str, *, flag: str) -> int:
    """Bytes of `200GB`, `1.5 TB` or `1000`; decimal units. Raises UserError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text.upper())
    if not found:
        raise UserError(f"{flag} {text} is no size; give one such as 200GB or 1.5TB")
    return int(float(found[1]) * _UNITS[found[2]])


@dataclass(frozen=True, kw_only=True)
class Mirror:
    """A set of shards elsewhere and its folder here; picklable, so that workers are given one."""

    root: Path
    """Of the folder here."""
    url: str
    budget: int
    """Bytes of all shards in the cache-dir."""
    timeout_s: float


Place = Path | Mirror
"""Where shards lie, as readers and workers are told."""


def open_shards(where: Place | str, cache: CacheOptions | None = None) -> Catalog:
    """The catalog of a folder or of a URL; the files of the latter come when they are opened.

    Raises UserError for what Catalog.load refuses, and where the URL cannot be read.
    """
    if not isinstance(where, Mirror):
        if not is_url(where):
            return Catalog.load(where)
        where = _mirror(str(where), (cache or CacheOptions()).options)
    catalog = Catalog.load(where.root)
    for name in catalog.files:
        if Path(name).name != name or name.startswith("."):
            raise UserError(f"{where.url}: {SHARDS_NAME} lists {name!r}, which is no name of a shard")
    return dataclasses.replace(catalog, bring=ShardCache(catalog, where))


def place_of(catalog: Catalog) -> Place:
    """What open_shards opens again as this catalog, in another process, too."""
    return catalog.bring.mirror if isinstance(catalog.bring, ShardCache) else catalog.root


def _mirror(url: str, cache: CacheOptions) -> Mirror:
    """The URL's set as it is now, its catalog in a folder here."""
    remote = RemoteFolder(url, timeout_s=cache.timeout_s)
    try:
        files = {name: remote.read(name) for name in (CATALOG_NAME, SHARDS_NAME)}
    except RemoteError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise UserError(
                f"there is no {error.url.rpartition('/')[2]} in {url} ({error.__cause__}); give the URL of a "
                f"folder that `linerate shard pack` wrote"
            ) from None
        raise
    digest = xxh3_64_hexdigest(b"\0".join([remote.url.encode(), *files.values()]))
    name = re.sub(r"[^\w.-]+", "-", remote.url.rpartition("/")[2]).lstrip(".") or "shards"
    base = cache.cache_dir or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "linerate"
    root = base.absolute() / f"{name}-{digest}"
    # For people, and the sign by which a folder of the cache is known. Nothing obeys it.
    files[REMOTE_NAME] = json.dumps({"url": remote.url}).encode()
    try:
        root.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            # Process numbers are the same in many containers that share a cache-dir.
            temp = root / f".{name}.{uuid.uuid4().hex}.tmp"
            temp.write_bytes(data)
            temp.replace(root / name)
    except OSError as error:
        raise UserError(
            f"--cache-dir {base} cannot be written ({error.strerror}: {error.filename}); name a folder that "
            f"you may write to, on a disk with room"
        ) from None
    budget = parse_size(cache.cache_bytes, flag="--cache-bytes")
    return Mirror(root=root, url=remote.url, budget=budget, timeout_s=cache.timeout_s)


def cache_need(catalog: Catalog, *, num_lanes: int, window_shards: int) -> int:
    """Bytes of the largest shards that num_lanes lanes mix at a time, with one each on its way."""
    num = min(catalog.num_shards, num_lanes * (window_shards + 1))
    return int(np.sort(catalog.shard_bytes)[::-1][:num].sum())


def require_room(catalog: Catalog, *, num_lanes: int, window_shards: int) -> None:
    """Raise UserError where the cache is too small for a node's lanes; local shards always pass."""
    if not isinstance(catalog.bring, ShardCache):
        return
    need = cache_need(catalog, num_lanes=num_lanes, window_shards=window_shards)
    if need > catalog.bring.budget:
        raise UserError(
            f"--cache-bytes {show_bytes(catalog.bring.budget)} does not hold what this machine reads at a "
            f"time: {num_lanes} lanes of {window_shards} + 1 shards, {show_bytes(need)}; give that much, "
            f"fewer --num-lanes, or smaller shards"
        )


def lanes_here(num_lanes: int, *, world_size: int) -> int:
    """How many of the lanes the ranks of this machine read, by torchrun's LOCAL_WORLD_SIZE."""
    local = min(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), world_size)
    return -(-num_lanes * local // world_size)


class LostShardError(UserError):
    """A shard that cannot be had, as opposed to a disk that is full."""

    def __init__(self, shard: int, reason: str) -> None:
        super().__init__(reason)
        self.shard, self.reason = shard, reason

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.shard, self.reason)


class ShardCache:
    """The files of one set in its folder of the cache. For any number of threads."""

    def __init__(self, catalog: Catalog, mirror: Mirror) -> None:
        self.catalog, self.mirror, self.budget = catalog, mirror, mirror.budget
        self.remote = RemoteFolder(mirror.url, timeout_s=mirror.timeout_s)
        self._told_over_budget = False

    def __call__(self, shard: int, suffix: str) -> Path:
        """The tar or the index of a shard, fetched where it is not here. Raises LostShardError, UserError."""
        self.fetch(shard, suffix)
        return self.path(shard, suffix)

    def path(self, shard: int, suffix: str) -> Path:
        return self.catalog.shard_path(shard).with_suffix(suffix)

    def open_tar(self, shard: int) -> int:
        """A descriptor of the tar; until it is closed nobody evicts the file."""
        while True:
            self(shard, TAR)
            if (file := self.hold_tar(shard)) is not None:
                return file

    def hold_tar(self, shard: int) -> int | None:
        """As open_tar, but None where the tar is not here: somebody has just evicted it."""
        try:
            file = os.open(self.path(shard, TAR), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if os.fstat(file).st_nlink:
            return file
        os.close(file)
        return None

    def fetch(
        self, shard: int, suffix: str, *, urgent: bool = True, pace: Callable[[], None] = lambda: None
    ) -> bool:
        """Have the file here; False where it is not urgent and there is no room, or another fetches it.

        pace: called between blocks, and may wait. Raises LostShardError, or UserError where the disk is full.
        """
        path = self.path(shard, suffix)
        size = int(self.catalog.shard_bytes[shard]) if suffix == TAR else 0
        part = path.with_name(f".{path.name}.{size}.part")
        began = time.time()
        while True:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)
                return True
            with _locked(part, wait=urgent) as file:
                if file is None:
                    return False
                if not _is_file_of(file, part):
                    continue  # whoever had it finished it, or it was evicted
                if path.exists():
                    part.unlink()
                    continue
                self._raise_failure_since(began, shard, path)
                if not self._make_room(part) and not urgent:
                    part.unlink()
                    return False
                self._fill(file, shard, suffix, path=path, pace=pace)
                part.rename(path)
                return True

    def _fill(self, file: int, shard: int, suffix: str, *, path: Path, pace: Callable[[], None]) -> None:
        """Bring the part to its end and check it. Raises LostShardError, and leaves a note for who waits."""
        try:
            if suffix == TAR:
                self._fill_tar(file, shard, path.name, pace)
            else:
                data = self._read_index(shard, path.name)
                os.ftruncate(file, 0)
                self._append(file, data)
            os.fdatasync(file)
        except RemoteError as error:
            with contextlib.suppress(OSError):  # it only saves others a try
                _failure_note(path).write_text(str(error), encoding="utf-8")
            raise LostShardError(shard, str(error)) from None

    def _read_index(self, shard: int, name: str) -> bytes:
        """Its bytes, once they are an index of as many rows as the shard has samples."""
        for _ in range(2):
            data = self.remote.read(name)
            with contextlib.suppress(pa.ArrowException):
                if pq.ParquetFile(pa.BufferReader(data)).metadata.num_rows == self.catalog.shard_sizes[shard]:
                    return data
        raise RemoteError(
            self.remote.name_of(name),
            f"it is no index of {self.catalog.shard_sizes[shard]} samples, fetched twice",
        )

    def _fill_tar(self, file: int, shard: int, name: str, pace: Callable[[], None]) -> None:
        size, expected = int(self.catalog.shard_bytes[shard]), int(self.catalog.shard_xxh3[shard])
        for _ in range(2):
            digest = xxh3_64()
            done = _hash_file(file, digest)

            def take(data: bytes, digest: xxh3_64 = digest) -> None:
                digest.update(data)
                self._append(file, data)
                pace()

            if done <= size:
                self.remote.download(name, start=done, size=size, take=take)
                if digest.intdigest() == expected:
                    return
            os.ftruncate(file, 0)
        raise RemoteError(
            self.remote.name_of(name), f"its bytes fail the checksum in {SHARDS_NAME}, fetched twice"
        )

    def _append(self, file: int, data: bytes) -> None:
        view = memoryview(data)
        place = os.lseek(file, 0, os.SEEK_END)
        while view:
            try:
                done = os.pwrite(file, view, place)
            except OSError as error:
                if error.errno not in _DISK_IS_FULL:
                    raise
                if self._evict(at_least=len(view)):
                    continue
                raise UserError(
                    f"the disk of --cache-dir {self.catalog.root.parent} is full and no shard there can be "
                    f"spared; make room, or give a smaller --cache-bytes than {show_bytes(self.budget)}"
                ) from None
            view, place = view[done:], place + done

    def _raise_failure_since(self, began: float, shard: int, path: Path) -> None:
        """Who waited for another's download that failed does not try the same again."""
        note = _failure_note(path)
        with contextlib.suppress(FileNotFoundError):
            if note.stat().st_mtime > began:
                raise LostShardError(shard, note.read_text(encoding="utf-8"))
            note.unlink()

    def _make_room(self, part: Path) -> bool:
        """Keep the budget, which counts every part by what it will be. False where too much is held."""
        with _locked(self.catalog.root.parent / ".lock", wait=True):
            files = _cached_files(self.catalog.root.parent)
            over = sum(size for _, size, _ in files) - self.budget
            over -= _remove(files, over, spare=part)
        if over > 0 and not self._told_over_budget:
            self._told_over_budget = True
            _log.warning(
                "cache %s: readers hold %s beyond its budget", self.catalog.root.parent, show_bytes(over)
            )
        return over <= 0

    def _evict(self, *, at_least: int) -> int:
        with _locked(self.catalog.root.parent / ".lock", wait=True):
            return _remove(_cached_files(self.catalog.root.parent), at_least, spare=None)


def _cached_files(cache_dir: Path) -> list[tuple[float, int, Path]]:
    """(last use, bytes, path) of all sets' tars, indexes and parts, the one used longest ago first."""
    found = []
    for root in cache_dir.iterdir():
        if not (root / REMOTE_NAME).is_file():
            continue
        for entry in os.scandir(root):
            if entry.name == SHARDS_NAME or not entry.name.endswith((TAR, INDEX, ".part")):
                continue
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                size = status.st_size
                if entry.name.endswith(".part"):
                    size = max(size, int(entry.name.split(".")[-2]))
                found.append((status.st_mtime, size, Path(entry.path)))
    return sorted(found)


def _remove(files: list[tuple[float, int, Path]], num_bytes: int, *, spare: Path | None) -> int:
    """Unlink files that nobody holds until num_bytes are freed; how many were."""
    freed = 0
    for _, size, path in files:
        if freed >= num_bytes:
            break
        if path == spare:
            continue
        with contextlib.suppress(FileNotFoundError), _locked(path, wait=False, create=False) as file:
            if file is not None and _is_file_of(file, path):
                path.unlink()
                freed += size
    return freed


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool, create: bool = True) -> Iterator[int | None]:
    """A descriptor that has the file's lock alone; None where another has it and we do not wait."""
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    file = os.open(path, flags, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        locked = True
    except BlockingIOError:
        locked = False
    except BaseException:
        os.close(file)
        raise
    try:
        yield file if locked else None
    finally:
        os.close(file)


def _is_file_of(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _hash_file(file: int, digest: xxh3_64) -> int:
    """Feed digest all that the file holds; how much that is."""
    done = 0
    while data := os.pread(file, _CHUNK_BYTES, done):
        digest.update(data)
        done += len(data)
    return done


def _failure_note(path: Path) -> Path:
    return path.with_name(f".{path.name}.failed")

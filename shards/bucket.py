"""The files under an s3:// or gs:// URL: listed, brought, taken, with patience."""

from __future__ import annotations

import contextlib
import errno
import functools
import random
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from linerate.shards.errors import UserError
from linerate.shards.fetch_options import FetchOptions
from linerate.shards.remote_store import open_store
from linerate.shards.remote_url import STORES

# s3fs's own 10 parts of 50 MiB at once would take 500 MiB of every worker.
PART_BYTES = 16 << 20
PARTS_AT_ONCE = 4
TRIES = 6
BACKOFF_S = 0.5
# A missing object is an error of the same type, and its path may hold the word. gcsfs says no more than what
# was asked: the list of the bucket's objects.
_NO_BUCKET = re.compile(r"NoSuchBucket|bucket does not exist|^b/[^/]+/o$", re.IGNORECASE)
# A part is long for a slow line.
_TIMEOUT_S = 60.0
T = TypeVar("T")


class Bucket:
    """A prefix in an object store. Every call is tried again, TRIES in all, while that can help.

    Raises UserError for what cannot: no such bucket, no credentials, no permission.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        scheme, _, self._path = self.url.partition("://")
        if scheme not in STORES or not self._path:
            raise UserError(f"OUT {url} is none that can be written to; give a folder, s3:// or gs://")
        self._parts = {"chunksize": PART_BYTES, "max_concurrency": PARTS_AT_ONCE} if scheme == "s3" else {}
        self._store: Any = open_store(scheme, FetchOptions(timeout_s=_TIMEOUT_S))

    def sizes(self) -> dict[str, int]:
        """Bytes of every file under the prefix, by its name after it."""
        return {name: int(info["size"]) for name, info in self.details("").items()}

    def details(self, folder: str) -> dict[str, dict[str, Any]]:
        """What the store tells of every file under the prefix and a folder in it, by its name after it."""
        prefix = f"{self._path}/"
        found = self._patiently(lambda: self._store.find(f"{prefix}{folder}".rstrip("/"), detail=True))
        return {
            name.removeprefix(prefix): info
            for name, info in found.items()
            if name.startswith(f"{prefix}{folder}")
        }

    def put(self, path: Path, name: str) -> None:
        """Store a file under `name`: wholly or not at all, as object stores do."""
        there = f"{self._path}/{name}"
        size = path.stat().st_size

        def send() -> None:
            self._store.put_file(str(path), there, **self._parts)
            stored = int(self._store.info(there)["size"])
            if stored != size:
                raise OSError(f"{self.url}/{name} has {stored} bytes after {size} were sent")

        self._patiently(send)

    def put_bytes(self, data: bytes, name: str) -> None:
        """Store a small file."""
        self._patiently(lambda: self._store.pipe_file(f"{self._path}/{name}", data))

    def get(self, name: str, path: Path) -> None:
        """Bring a file; what lies at `path` is whole or from before."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = path.with_name(f".{path.name}.tmp")
        self._patiently(lambda: self._store.get_file(f"{self._path}/{name}", str(temp)))
        temp.replace(path)

    def read(self, name: str, function: Callable[[Any], T]) -> T:
        """What `function` makes of the file, opened for reading at any place."""

        def opened() -> T:
            with self._store.open(f"{self._path}/{name}", "rb") as file:
                return function(file)

        return self._patiently(opened)

    def open(self, name: str) -> BinaryIO:
        """The file, of which each read asks for just its bytes."""
        opened: BinaryIO = self._patiently(
            lambda: self._store.open(f"{self._path}/{name}", "rb", cache_type="none")
        )
        return opened

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, one after the other; one that is gone is no error."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self._patiently(functools.partial(self._store.rm_file, f"{self._path}/{name}"))

    def _patiently(self, function: Callable[[], T]) -> T:
        jitter = random.Random(self.url)
        for number in range(TRIES):
            if number:
                time.sleep(BACKOFF_S * 2 ** (number - 1) * jitter.uniform(0.5, 1.5))
            try:
                return function()
            except FileNotFoundError as error:
                if _NO_BUCKET.search(str(error)):
                    raise UserError(
                        f"{self.url}: {error}; make the bucket first, or give another OUT"
                    ) from None
                raise
            except PermissionError as error:
                raise UserError(f"{self.url}: {error}; give an OUT that you may write") from None
            except (UserError, ValueError):  # what `read` was given to do
                raise
            except Exception as error:
                if type(error).__name__.endswith("CredentialsError"):
                    raise UserError(f"{self.url}: {error}; set the credentials of the store") from None
                problem = error
        said = f"{self.url}: {type(problem).__name__}: {problem} (after {TRIES} tries)"
        raise OSError(errno.EIO, said)

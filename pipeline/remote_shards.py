"""A folder of shards elsewhere (s3://, gs://, https://) by fsspec: in ranges, resumed where a line broke."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

from linerate.shards.errors import UserError
from linerate.shards.remote_url import show_url, without_userinfo

# A block that fails is asked for again at half its size, so a slow line gets on within the time limit, too.
MAX_BLOCK_BYTES, MIN_BLOCK_BYTES = 8 * 2**20, 2**18
ATTEMPTS = 8
"""So many failures in a row, none of which brought a byte, are the end."""
FIRST_PAUSE_S = 0.25
"""Doubled from one failure to the next: 8 attempts wait 32 s in all, besides the time limits."""

SCHEMES = ("s3", "gs", "https", "http", "memory")
"""memory:// is fsspec's, within one process: for tests."""
_EXTRAS = {"s3": "s3", "gs": "gcs", "http": "http", "https": "http"}
# Of libraries that need not be installed, hence by name.
_NO_CREDENTIALS = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ProfileNotFound"}
)
_NO_CREDENTIALS_HINT = (
    "there are no credentials; set those of its provider, as AWS_PROFILE, or for a public bucket "
    """FSSPEC_S3='{"anon": true}'"""
)


class RemoteError(UserError):
    """A file elsewhere that cannot be had: its URL and the reason."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url}: {' '.join(reason.split())}")
        self.url, self.reason = url, reason

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.url, self.reason)


def is_url(where: object) -> bool:
    """Is this no path of this machine?"""
    return "://" in str(where)


class RemoteFolder:
    """Files of one URL. For any number of threads, and for a process that was forked meanwhile."""

    def __init__(self, url: str, *, timeout_s: float = 30.0) -> None:
        """timeout_s: how long one answer, of at most 8 MiB, may take.

        Raises UserError for a scheme that is not one of SCHEMES, and for a URL with a name and password: it
        would stand in messages, logs and the cache.
        """
        if url.partition("://")[0].lower() not in SCHEMES:
            raise UserError(f"{show_url(url)} is none of {', '.join(f'{one}://' for one in SCHEMES[:-1])}")
        if url != without_userinfo(url):
            raise UserError(
                f"{show_url(url)} has a name and password in it, which would be stored; put them into "
                """~/.netrc and set FSSPEC_HTTPS='{"client_kwargs": {"trust_env": true}}'"""
            )
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        self._opened: tuple[int, Any, str] | None = None

    def name_of(self, name: str) -> str:
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes:
        """A small file as a whole. Raises RemoteError."""
        failures = 0
        while True:
            try:
                return self._cat(name, None, None)
            except Exception as error:
                failures += 1
                self._wait_or_raise(name, error, failures)

    def download(self, name: str, *, start: int, size: int, take: Callable[[bytes], None]) -> None:
        """Give take the bytes from start to size, in order; it may raise. Raises RemoteError.

        What take was given is never asked for again, whatever breaks.
        """
        done, block, failures = start, MAX_BLOCK_BYTES, 0
        while done < size:
            end = min(done + block, size)
            try:
                data = self._cat(name, done, end)
                if not data:
                    raise OSError(f"it ended at byte {done:,} of {size:,}")
            except Exception as error:
                failures += 1
                block = max(block // 2, MIN_BLOCK_BYTES)
                self._require_size(name, size, error)
                self._wait_or_raise(name, error, failures)
                continue
            if len(data) > end - done:  # a server that knows no ranges sent the whole file
                data = data[done:size]
            take(data)
            done += len(data)
            failures, block = 0, min(2 * block, MAX_BLOCK_BYTES)

    def _cat(self, name: str, start: int | None, end: int | None) -> bytes:
        filesystem, root = self._open()
        path = f"{root}/{name}"
        if not filesystem.async_impl:
            return bytes(filesystem.cat_file(path, start=start, end=end))

        async def within() -> bytes:
            # fsspec's own limit would leave the request running.
            return bytes(
                await asyncio.wait_for(filesystem._cat_file(path, start=start, end=end), self.timeout_s)
            )

        from fsspec.asyn import sync

        return bytes(sync(filesystem.loop, within))

    def _require_size(self, name: str, size: int, error: Exception) -> None:
        """Raise RemoteError where the file is not of that size: no attempt will bring what it lacks."""
        if isinstance(error, TimeoutError) or _is_final(error):
            return
        filesystem, root = self._open()
        try:
            found = filesystem.info(f"{root}/{name}", **_limit(filesystem, self.timeout_s)).get("size")
        except Exception:
            return  # what broke the transfer broke this as well
        if found is not None and int(found) != size:
            raise RemoteError(self.name_of(name), f"it holds {int(found):,} bytes, the catalog says {size:,}")

    def _wait_or_raise(self, name: str, error: Exception, failures: int) -> None:
        if _is_final(error) or failures >= ATTEMPTS:
            raise RemoteError(self.name_of(name), self._describe(error)) from error
        time.sleep(FIRST_PAUSE_S * 2 ** (failures - 1))

    def _describe(self, error: Exception) -> str:
        if isinstance(error, FileNotFoundError):
            return "there is no such file"
        if type(error).__name__ in _NO_CREDENTIALS:
            return _NO_CREDENTIALS_HINT
        if isinstance(error, PermissionError) or getattr(error, "status", 0) in (401, 403):
            return f"access is denied ({error}); give credentials that may read it"
        if isinstance(error, TimeoutError):
            return (
                f"no answer within {self.timeout_s:g} s, {ATTEMPTS} times; try again, or a longer --timeout-s"
            )
        return f"{type(error).__name__}: {error}; tried {ATTEMPTS} times"

    def _open(self) -> tuple[Any, str]:
        """The filesystem of this process: connections and threads do not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            import fsspec  # 0.1 s, which local shards do not need

            protocol = self.url.partition("://")[0]
            try:
                filesystem, root = fsspec.core.url_to_fs(
                    self.url, **({} if protocol == "memory" else {"skip_instance_cache": True})
                )
            except ImportError as error:
                extra = _EXTRAS.get(protocol)
                way = f"pip install 'linerate[{extra}]'" if extra else f"install it ({error})"
                raise RemoteError(self.url, f"{protocol}:// needs another package: {way}") from None
            self._opened = os.getpid(), filesystem, root.rstrip("/")
        return self._opened[1:]


def _limit(filesystem: Any, timeout_s: float) -> dict[str, float]:
    return {"timeout": timeout_s} if filesystem.async_impl else {}


def _is_final(error: Exception) -> bool:
    """Would another attempt end as this one?"""
    return (
        isinstance(error, FileNotFoundError | PermissionError | UserError)
        or type(error).__name__ in _NO_CREDENTIALS
        or getattr(error, "status", 0) in (401, 403)
    )

"""One image from an object store (s3, gs) through fsspec; credentials and endpoint are the user's own."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from typing import Any

from linerate.shards.errors import UserError
from linerate.shards.fetch_options import FetchOptions
from linerate.shards.inspect_image import RejectedError
from linerate.shards.remote_http import WHOLE_TRY, RetryError
from linerate.shards.remote_url import Url

# What one request asks for at first; a longer image is asked for again, whole, once its memory is granted.
FIRST_BYTES = 1 << 21
_EXTRAS = {"s3": "s3", "gs": "gcs"}


def open_store(scheme: str, options: FetchOptions) -> Any:
    """The fsspec file system of this scheme, which tries once: tries are counted in one place, ours.

    Raises UserError where its library is not installed.
    """
    import fsspec

    settings: dict[str, Any] = {}
    if scheme == "s3":
        settings["config_kwargs"] = {
            "connect_timeout": options.timeout_s,
            "read_timeout": options.timeout_s,
            "max_pool_connections": options.in_flight,
            "retries": {"max_attempts": 0},
        }
    try:
        store = fsspec.filesystem(scheme, use_listings_cache=False, **settings)
    except ImportError as error:
        raise UserError(
            f"{scheme}:// needs a library that is not installed ({error.name}); "
            f"pip install 'linerate[{_EXTRAS[scheme]}]'"
        ) from None
    store.retries = 1
    return store


class StoreClient:
    """The object stores that one task reads; safe to use from many threads."""

    def __init__(self, options: FetchOptions) -> None:
        self._options = options
        self._stores: dict[str, Any] = {}
        self._opening = threading.Lock()

    def get(self, url: Url, body: bytearray, grow: Callable[[int], None], *, max_bytes: int) -> None:
        """Append the object to `body`; grow, errors: as HttpClient.get."""
        store = self._open(url.scheme)
        path = f"{url.host}/{url.target}"
        first = min(FIRST_BYTES, max_bytes + 1)
        grow(first)
        data = self._read(store, path, first)
        if len(data) == first:
            size = int(self._call(store, store._info, path)["size"])
            grow(size)
            data = self._read(store, path, max_bytes + 1) if size > first else data
        grow(len(data))
        body += data

    def ask(self, url: Url) -> tuple[int, str]:
        """(bytes, version) of an object. Errors: as HttpClient.get."""
        store = self._open(url.scheme)
        info = self._call(store, store._info, f"{url.host}/{url.target}")
        if info.get("type") == "directory":
            raise RejectedError("not found", "no such object")
        version = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("updated")
        return int(info["size"]), str(version or "")

    def read_range(self, url: Url, start: int, end: int) -> bytes:
        """Bytes start..end-1 of an object that has them, at least one. Errors: as HttpClient.get."""
        store = self._open(url.scheme)
        data = bytes(self._call(store, store._cat_file, f"{url.host}/{url.target}", start=start, end=end))
        if not 0 < len(data) <= end - start:
            raise RetryError("cut short", f"{len(data)} of {end - start} bytes")
        return data

    def list_prefix(self, url: Url) -> dict[str, int]:
        """Bytes of every object below a prefix, by its URL. Errors: as HttpClient.get."""
        store = self._open(url.scheme)
        found = self._call(store, store._find, f"{url.host}/{url.target}".rstrip("/"), detail=True)
        return {f"{url.scheme}://{name}": int(info["size"]) for name, info in found.items()}

    def _open(self, scheme: str) -> Any:
        with self._opening:
            if scheme not in self._stores:
                self._stores[scheme] = open_store(scheme, self._options)
            return self._stores[scheme]

    def _read(self, store: Any, path: str, num_bytes: int) -> bytes:
        try:
            return bytes(self._call(store, store._cat_file, path, start=0, end=num_bytes))
        except _EmptyError:
            return b""

    def _call(self, store: Any, function: Any, *args: Any, **named: Any) -> Any:
        from fsspec.asyn import sync

        limit_s = WHOLE_TRY * self._options.timeout_s
        try:
            return sync(store.loop, function, *args, timeout=limit_s, **named)
        except (RejectedError, RetryError, UserError):
            raise
        except Exception as error:
            raise _translated(error) from None


class _EmptyError(Exception):
    """A range of an object without bytes."""


def _translated(error: Exception) -> Exception:
    """What a library's exception means for this image, or for all of them.

    s3fs turns the store's codes into OSErrors; what is none comes from the layers below it.
    """
    cause = error.__cause__ or error.__context__ or error
    code = _code(cause)
    status = getattr(error, "code", None) or getattr(error, "status", None)
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"):
        return UserError(f"the object store wants credentials: {_line(error)}; set them, or make it public")
    if code == "InvalidRange" or "InvalidRange" in str(error) or status == 416:
        return _EmptyError()
    if isinstance(error, FileNotFoundError) or status == 404:
        return RejectedError("not found", code or "no such object")
    if isinstance(error, PermissionError) or status in (401, 403):
        return RejectedError("forbidden", code or _line(error))
    if isinstance(error, TimeoutError | asyncio.TimeoutError) or "Timeout" in type(error).__name__:
        return RetryError("timed out")
    if isinstance(error, OSError) and error.errno == errno.EINVAL:
        return RejectedError("unreachable", code or _line(error))
    return RetryError(code or type(error).__name__, _line(error))


def _code(error: BaseException) -> str:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]

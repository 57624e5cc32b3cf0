"""Sources that lie at URLs: which files they are, and of what kind; what is in them is brought later."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from linerate.shards.errors import UserError
from linerate.shards.fetch_options import FetchOptions
from linerate.shards.inspect_image import RejectedError
from linerate.shards.manifest import ManifestSource, manifest_kind
from linerate.shards.options import ManifestColumns
from linerate.shards.remote_http import RetryError
from linerate.shards.remote_store import StoreClient
from linerate.shards.remote_url import STORES, Url, is_url, parse_url, show_url
from linerate.shards.sources import SourceReject, SourceRow

_SIGNS = "*?["
_BESIDE_TARS = (".idx", ".json", ".txt", ".parquet", ".crc")
_WAYS = (
    "give tars (.tar), manifests (.parquet, .csv, .tsv, .jsonl), or an s3:// or gs:// prefix or pattern of "
    "them; images in a bucket are packed by a manifest of their URLs"
)


@dataclass(frozen=True)
class RemoteTars:
    """Tars at URLs, not yet read; remote_tars.bring_source makes a source of them that can be listed."""

    urls: tuple[str, ...]

    @property
    def containers(self) -> list[str]:
        """The URLs, as they may be shown and stored."""
        return [show_url(url) for url in self.urls]

    def rows(self) -> Iterator[SourceRow | SourceReject]:
        raise AssertionError("bring_source reads the tars first")


def any_urls(paths: Sequence[Path | str]) -> bool:
    """Are these URLs? Raises UserError where only some are."""
    remote = [isinstance(path, str) and is_url(path) for path in paths]
    if any(remote) and not all(remote):
        here = next(path for path, there in zip(paths, remote, strict=True) if not there)
        raise UserError(f"{here} lies here, other sources at URLs; pack one, then the others with --append")
    return any(remote)


def open_urls(
    urls: Sequence[str], columns: ManifestColumns, options: FetchOptions
) -> RemoteTars | ManifestSource:
    """The source that these URLs make: tars, or manifests with these columns.

    Prefixes and patterns of object stores are listed; nothing is read yet. Raises UserError for what is
    neither, or of both kinds.
    """
    files = [file for url in urls for file in _files_at(url, options)]
    tars = [file for file in files if _name(file).endswith(".tar")]
    if tars and len(tars) < len(files):
        raise UserError("the URLs are of tars and of manifests; give one kind, then the other with --append")
    if tars:
        return RemoteTars(tuple(sorted(files)))
    return ManifestSource([], columns, urls=tuple(files))


def _files_at(text: str, options: FetchOptions) -> list[str]:
    scheme, _, rest = text.partition("://")
    bucket, _, name = rest.partition("/")
    try:
        # A bucket alone is a prefix, too.
        url = parse_url(f"{scheme}://{bucket}/{name or '*'}" if scheme.lower() in STORES else text)
    except RejectedError as reject:
        raise UserError(f"the source {show_url(text)} cannot be read: {reject}") from None
    if not url.is_store:
        if not _is_kind(_name(text)):
            raise UserError(
                f"the source {show_url(text)} is neither a tar nor a manifest by its name; {_WAYS}"
            )
        return [text]
    if any(sign in name for sign in _SIGNS):
        return _matching(url, name, options)
    if _is_kind(name):
        return [text]
    return _below(text, url, name, options)


def _matching(url: Url, name: str, options: FetchOptions) -> list[str]:
    before = re.split(r"[*?\[]", name, maxsplit=1)[0].rpartition("/")[0]
    listed = _list(Url(url.scheme, url.host, 0, before), options)
    pattern = f"/{url.host}/{name}"
    found = [
        one
        for one in listed
        if PurePosixPath(f"/{one.partition('://')[2]}").match(pattern) and _is_kind(_name(one))
    ]
    if not found:
        raise UserError(
            f"{url.origin}/{name} matches no tar and no manifest among {len(listed)} objects; {_WAYS}"
        )
    return sorted(found)


def _below(text: str, url: Url, name: str, options: FetchOptions) -> list[str]:
    prefix = f"{url.origin}/{name}".rstrip("/") + "/"
    listed = sorted(
        one for one in _list(Url(url.scheme, url.host, 0, name), options) if one.startswith(prefix)
    )
    shown = [one for one in listed if not _name(one).startswith((".", "_"))]
    tars = [one for one in shown if one.endswith(".tar")]
    if tars and _only(shown, (".tar", *_BESIDE_TARS)):
        return tars
    tables = [one for one in shown if manifest_kind(_name(one)) == "parquet"]
    if tables and _only(shown, (".parquet", ".parq", ".pq", ".json", ".txt", ".md", ".crc")):
        return tables
    what = (
        f"holds {len(shown)} objects, which are not all tars or Parquet files" if shown else "does not exist"
    )
    raise UserError(f"the source {show_url(text)} {what}; {_WAYS}")


def _only(urls: Iterable[str], suffixes: tuple[str, ...]) -> bool:
    return all(url.endswith(suffixes) for url in urls)


def _list(url: Url, options: FetchOptions) -> list[str]:
    try:
        return list(StoreClient(options).list_prefix(url))
    except (RejectedError, RetryError) as error:
        raise UserError(f"{url.origin}/{url.target} cannot be listed: {error}") from None


def _is_kind(name: str) -> bool:
    return name.endswith(".tar") or manifest_kind(name) is not None


def _name(url: str) -> str:
    return show_url(url).rpartition("/")[2]

"""Shards in an object store, looked at from here: what is asked for comes into a folder that is removed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from linerate.shards.bucket import Bucket
from linerate.shards.catalog import CATALOG_NAME, REJECTED_NAME, SHARDS_NAME, Catalog
from linerate.shards.errors import UserError
from linerate.shards.out_folder import is_ours
from linerate.shards.remote_url import STORES, is_url
from linerate.shards.shard_stats import STATS_NAME

_AT_ONCE = 16


@dataclass(frozen=True)
class Look:
    """Shards that are looked at, here or elsewhere."""

    catalog: Catalog
    """Its root is a folder here; what is missing there of an index comes when it is opened."""
    url: str
    """Empty where the shards lie here."""

    @property
    def place(self) -> str:
        """As the user called it."""
        return self.url or str(self.catalog.root)

    def sizes(self) -> dict[str, int]:
        """Bytes of every file that lies with the catalog, by name."""
        if self.url:
            return Bucket(self.url).sizes()
        return {path.name: path.stat().st_size for path in self.catalog.root.iterdir() if path.is_file()}

    def bring_indexes(self) -> None:
        """Have the .parquet of every shard here, as DuckDB reads them."""
        if self.url:
            stems = [name.removesuffix(".tar") for name in self.catalog.files]
            _bring(Bucket(self.url), self.catalog.root, [f"{stem}.parquet" for stem in stems])


@contextlib.contextmanager
def look_at(where: str, *, staging: Path | None = None) -> Iterator[Look]:
    """The shards in a folder, or under an s3:// or gs:// URL, of which only the catalog is fetched at once.

    staging: where a folder for what is fetched is made, and removed when the block ends; by default the
    system's own for temporary files. Raises UserError as Catalog.load does, by the name the user gave.
    """
    if not is_url(where):
        yield Look(Catalog.load(where), "")
        return
    if not where.startswith(tuple(f"{scheme}://" for scheme in STORES)):
        raise UserError(
            f"shards at {where} are not looked at there; give a folder, s3:// or gs://, or copy them here"
        )
    bucket = Bucket(where)
    with _folder_for(staging) as folder:
        try:
            _bring(bucket, folder, [CATALOG_NAME, SHARDS_NAME, REJECTED_NAME, STATS_NAME])
            catalog = Catalog.load(folder)
            for name in catalog.files:
                if not is_ours(name):
                    raise UserError(f"{folder / SHARDS_NAME} lists {name!r}, which is no name of a shard")
            catalog = dataclasses.replace(
                catalog,
                bring=functools.partial(bring_file, catalog, bucket),
                open_there=functools.partial(_open_there, catalog, bucket),
            )
            yield Look(catalog, bucket.url)
        except UserError as error:
            raise UserError(str(error).replace(str(folder), bucket.url)) from None


def bring_file(catalog: Catalog, bucket: Bucket, shard: int, suffix: str) -> Path:
    """A file of a shard, fetched where it is not here; where there is none the path leads to nothing."""
    path = catalog.shard_path(shard).with_suffix(suffix)
    if not path.exists():
        with contextlib.suppress(FileNotFoundError):
            bucket.get(path.name, path)
    return path


def _open_there(catalog: Catalog, bucket: Bucket, shard: int) -> BinaryIO:
    return bucket.open(catalog.files[shard])


def _bring(bucket: Bucket, folder: Path, names: list[str]) -> None:
    def bring(name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # whoever needs it says so
            bucket.get(name, folder / name)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done in [pool.submit(bring, name) for name in names]:
            done.result()


@contextlib.contextmanager
def _folder_for(staging: Path | None) -> Iterator[Path]:
    try:
        if staging:
            staging.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix="linerate-look-", dir=staging)
    except OSError as error:
        raise UserError(
            f"{staging} cannot be written ({error.strerror}); give another by --staging"
        ) from None
    with made as folder:
        yield Path(folder)

"""Packing into a bucket: shards pass through a staging folder, and what makes OUT whole is sent last.

An object store has no rename and no lock, but an object appears whole or not at all. So each shard is packed
in the staging folder, its .tar, .idx and then its .parquet, the mark, are sent, and they are removed here;
catalog.json is sent when all marks are there. What a killed run left is told by the bucket alone: the staging
folder can be lost.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from linerate.shards.bucket import Bucket
from linerate.shards.catalog import CATALOG_NAME, REJECTED_NAME, SHARDS_NAME
from linerate.shards.errors import UserError
from linerate.shards.out_folder import WORK_NAME, is_ours, lock_folder
from linerate.shards.plan import HEADER_NAME, REJECTS_NAME
from linerate.shards.remote_url import is_url

if TYPE_CHECKING:
    from linerate.shards.pack_shard import ShardMark, ShardTask

# What tells a run how far another one came, apart from the shards' marks; the last one makes OUT whole.
_RESULTS = (REJECTED_NAME, "pack_stats.parquet", SHARDS_NAME, CATALOG_NAME)
_PLAN = (f"{WORK_NAME}/{REJECTS_NAME}", f"{WORK_NAME}/{HEADER_NAME}")
_READERS = 16
T = TypeVar("T")


def is_remote(out: Path | str) -> bool:
    """Is this a URL rather than a folder?"""
    return isinstance(out, str) and is_url(out)


def pack_through(url: str, staging: Path | None, pack_into: Callable[[Path, str], T]) -> T:
    """Call pack_into(folder, url) with a staging folder that knows what lies under `url`, send the rest.

    staging: the folder's parent; by default one of the user's own under the system's temporary folder. It
    holds the plan, two shards for each worker, and a copy of large tars. Its name follows from `url`, and two
    runs at once are refused.
    Raises UserError where `url` holds something else or cannot be written.
    """
    bucket = Bucket(url)
    base = _staging_folder(bucket.url, staging)
    folder = base / "shards"
    with lock_folder(base):
        shutil.rmtree(folder, ignore_errors=True)
        _bring_state(bucket, folder)
        try:
            result = pack_into(folder, bucket.url)
        except UserError as error:
            if not (folder / WORK_NAME / HEADER_NAME).exists():
                _abandon(bucket)
            raise UserError(str(error).replace(f"OUT {folder}", f"OUT {bucket.url}")) from None
        for name in _RESULTS:
            if (folder / name).exists():
                bucket.put(folder / name, name)
        bucket.remove(reversed(_PLAN))
        for path in folder.iterdir():
            if path.name not in _RESULTS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return result


def publish_plan(url: str, folder: Path) -> None:
    """Tell later runs what was begun here, before the first shard is sent."""
    bucket = Bucket(url)
    for name in _PLAN:
        bucket.put(folder / name, name)


def send_shard(task: ShardTask, mark: ShardMark) -> None:
    """Send a whole shard, its mark last, and remove it here."""
    bucket = Bucket(task.upload_to)
    suffixes = (".tar", ".idx", ".parquet") if mark.samples else (".parquet",)
    for suffix in suffixes:
        path = task.stem.with_suffix(suffix)
        bucket.put(path, path.name)
    for suffix in suffixes:
        task.stem.with_suffix(suffix).unlink()


def load_marks_there(tasks: Sequence[ShardTask], *, plan_id: str) -> dict[int, ShardMark]:
    """The marks of the tasks whose shards lie whole in the bucket, by the shards' numbers."""
    bucket = Bucket(tasks[0].upload_to)
    sizes = bucket.sizes()
    stems = [task.stem.name for task in tasks if f"{task.stem.name}.parquet" in sizes]
    with ThreadPoolExecutor(_READERS) as pool:
        marks = list(pool.map(lambda stem: _mark_there(bucket, sizes, stem, plan_id), stems))
    return {mark.shard: mark for mark in marks if mark}


def _mark_there(bucket: Bucket, sizes: dict[str, int], stem: str, plan_id: str) -> ShardMark | None:
    from linerate.shards.pack_shard import MARK_KEY, ShardMark

    try:
        schema: Any = bucket.read(f"{stem}.parquet", pq.read_schema)
        mark = ShardMark(**json.loads((schema.metadata or {})[MARK_KEY]))
    except (KeyError, TypeError, ValueError, pa.ArrowException, FileNotFoundError):
        return None
    whole = not mark.samples or (sizes.get(f"{stem}.tar") == mark.tar_bytes and f"{stem}.idx" in sizes)
    return mark if whole and mark.plan_id == plan_id and stem.endswith(f"-{mark.shard:06d}") else None


def _bring_state(bucket: Bucket, folder: Path) -> None:
    """Make the folder look as if the shards in the bucket had been begun in it."""
    sizes = bucket.sizes()
    begun = {CATALOG_NAME, _PLAN[-1]} & sizes.keys()
    if not begun and (foreign := sorted(name for name in sizes if not is_ours(name) and name not in _PLAN)):
        some = ", ".join(foreign[:3])
        raise UserError(f"OUT {bucket.url} holds something else ({some}); give a prefix that is new or empty")
    (folder / WORK_NAME).mkdir(parents=True)
    wanted = [name for name in (*_RESULTS, *_PLAN) if name in sizes]
    if not begun:  # any mark tells whose shards these are
        wanted += _marks(sizes)[:1]
    for name in wanted:
        bucket.get(name, folder / name)


def _marks(sizes: dict[str, int]) -> list[str]:
    """The names of shards' marks; no other name in a bucket ever becomes a path here."""
    return [n for n in sorted(sizes) if n.endswith(".parquet") and is_ours(n) and n not in _RESULTS]


def _abandon(bucket: Bucket) -> None:
    """Nothing was kept, so nothing is to be continued: remove the marks of shards without samples."""
    sizes = bucket.sizes()
    if _PLAN[-1] in sizes:
        tars = {name.removesuffix(".tar") for name in sizes if name.endswith(".tar")}
        empty = [
            name for name in sizes if name.endswith(".parquet") and name.removesuffix(".parquet") not in tars
        ]
        bucket.remove([name for name in empty if is_ours(name) and name not in _RESULTS])
        bucket.remove(reversed(_PLAN))


def _staging_folder(url: str, staging: Path | None) -> Path:
    parent = staging or Path(tempfile.gettempdir()) / f"linerate-{os.getuid()}"
    try:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if staging is None and parent.stat().st_uid != os.getuid():
            raise UserError(f"{parent} belongs to somebody else; give a folder of your own by --staging")
        folder = parent / f"staging-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UserError(f"{parent} cannot be written ({error.strerror}); give another by --staging") from None
    return folder

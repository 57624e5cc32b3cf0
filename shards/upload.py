"""Packing into a bucket: shards pass through a staging folder, and what makes OUT whole is sent last.

An object store has no rename and no lock, but an object appears whole or not at all. So each shard is packed
in the staging folder, its .tar, .idx and then its .parquet, the mark, are sent, and they are removed here;
catalog.json is sent when all marks are there. What a killed run left is told by the bucket alone: the staging
folder can be lost.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from linerate.shards.append import PLACE_NAME, refuse_unlisted
from linerate.shards.bucket import Bucket
from linerate.shards.catalog import CATALOG_NAME, REJECTED_NAME, SHARDS_NAME, Catalog
from linerate.shards.claims import Role, claim
from linerate.shards.errors import UserError
from linerate.shards.out_folder import TARS_NAME, WORK_NAME, is_ours, lock_folder
from linerate.shards.plan import HEADER_NAME, REJECTS_NAME
from linerate.shards.remote_url import is_url

if TYPE_CHECKING:
    from linerate.shards.pack_shard import ShardMark, ShardTask

# What tells a run how far another one came, apart from the shards' marks; the last one makes OUT whole.
_RESULTS = (REJECTED_NAME, "pack_stats.parquet", SHARDS_NAME, CATALOG_NAME)
_HEADER = f"{WORK_NAME}/{HEADER_NAME}"
_ROWS = re.compile(rf"{re.escape(WORK_NAME)}/plan(-\d+)?\.parquet")
# What is taken of the work folder; no other name in a bucket ever becomes a path here.
_STATE = re.compile(
    rf"{re.escape(WORK_NAME)}/({re.escape(HEADER_NAME)}|{re.escape(REJECTS_NAME)}|known\.json|"
    r"worker_count\.json|stats-\d+-of-\d+\.jsonl|base/(catalog\.json|shards\.parquet|rejected\.parquet|"
    r"place\.json))"
)
PACKS_ALL = Role("pack")
# How errors name OUT, which the user knows by its URL.
_OUT_IN_TEXT = re.compile(r"(OUT|plan in|way in|shards of|shards in|shards,|writing to) \0")
_READERS = 16
T = TypeVar("T")


def is_remote(out: Path | str) -> bool:
    """Is this a URL rather than a folder?"""
    return isinstance(out, str) and is_url(out)


@dataclass(frozen=True)
class Staged:
    """A folder that knows what lies in a bucket, and the bucket."""

    bucket: Bucket
    folder: Path


@contextlib.contextmanager
def open_staging(
    url: str, staging: Path | None, *, role: Role = PACKS_ALL, with_marks: bool = False
) -> Iterator[Staged]:
    """A staging folder that knows what lies under `url`, where nobody else writes until the block ends.

    staging: the folder's parent; by default one of the user's own under the system's temporary folder. It
    holds the plan, two shards for each worker, and a copy of large tars. Its name follows from `url` and the
    role. Other writers are refused as claims.py says. with_marks: also bring the .parquet of every shard.
    Raises UserError where `url` holds something else or cannot be written, and where somebody writes there.
    """
    bucket = Bucket(url)
    _refuse_foreign(bucket, bucket.sizes())
    base = _staging_folder(bucket.url if role == PACKS_ALL else f"{bucket.url} {role.name}", staging)
    folder = base / "shards"
    with lock_folder(base), claim(bucket, role):
        _clear(folder)
        _bring_state(bucket, folder, with_marks=with_marks)
        try:
            yield Staged(bucket, folder)
        except UserError as error:
            text = str(error).replace(str(folder), "\0")
            text = _OUT_IN_TEXT.sub(lambda found: f"{found[1]} {bucket.url}", text)
            raise UserError(text.replace("\0", str(folder))) from None


def pack_through(
    url: str, staging: Path | None, pack_into: Callable[[Path, str], T], *, with_marks: bool = False
) -> T:
    """Call pack_into(folder, url) in open_staging's folder, then send the rest and tidy up."""
    with open_staging(url, staging, with_marks=with_marks) as staged:
        bucket, folder = staged.bucket, staged.folder
        try:
            result = pack_into(folder, bucket.url)
        except UserError:
            if not (folder / WORK_NAME / HEADER_NAME).exists():
                _abandon(bucket)
            raise
        for name in _RESULTS:
            if (folder / name).exists():
                bucket.put(folder / name, name)
        _remove_state(bucket)
        for path in folder.iterdir():
            if path.name not in _RESULTS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return result


def publish_plan(bucket: Bucket, folder: Path, *, with_rows: bool = False) -> None:
    """Tell later runs what was begun here, before the first shard is sent; its header last.

    with_rows: the task lists too, for workers on other machines. They may hold the names and passwords of
    URLs, as no other file in the bucket does, until the shards are finished.
    """
    names = [path.relative_to(folder).as_posix() for path in sorted((folder / WORK_NAME).rglob("*"))]
    for name in sorted(names, key=lambda name: name == _HEADER):
        if (_STATE.fullmatch(name) and "/stats-" not in name) or (with_rows and _ROWS.fullmatch(name)):
            bucket.put(folder / name, name)


def bring_plan(bucket: Bucket, folder: Path) -> bool:
    """Bring the plan with its task lists, its header last. Is there one?"""
    names = [name for name in bucket.details(WORK_NAME) if _STATE.fullmatch(name) or _ROWS.fullmatch(name)]
    if _HEADER not in names or not any(map(_ROWS.fullmatch, names)):
        return False
    for name in sorted(names, key=lambda name: name == _HEADER):
        bucket.get(name, folder / name)
    return True


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
    if not tasks:
        return {}
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


def _refuse_foreign(bucket: Bucket, sizes: dict[str, int]) -> None:
    if {CATALOG_NAME, _HEADER} & sizes.keys():
        return
    foreign = sorted(name for name in sizes if not is_ours(name) and not name.startswith(f"{WORK_NAME}/"))
    if foreign:
        some = ", ".join(foreign[:3])
        raise UserError(f"OUT {bucket.url} holds something else ({some}); give a prefix that is new or empty")


def _clear(folder: Path) -> None:
    """Remove all but remote tars that were read: the bucket tells the rest."""
    work = folder / WORK_NAME
    work.mkdir(parents=True, exist_ok=True)
    for path in (*folder.iterdir(), *work.iterdir()):
        if path not in (work, work / TARS_NAME):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _bring_state(bucket: Bucket, folder: Path, *, with_marks: bool) -> None:
    """Make the folder look as if the shards in the bucket had been begun in it."""
    sizes = bucket.sizes()
    wanted = [name for name in sizes if name in _RESULTS or _STATE.fullmatch(name)]
    if with_marks:
        wanted += _marks(sizes)
    elif not {CATALOG_NAME, _HEADER} & sizes.keys():  # any mark tells whose shards these are
        wanted += _marks(sizes)[:1]
    with ThreadPoolExecutor(_READERS) as pool:
        for done in [pool.submit(bucket.get, name, folder / name) for name in wanted]:
            done.result()
    if with_marks and CATALOG_NAME in sizes and _HEADER not in sizes:
        refuse_unlisted(Catalog.load(folder), sizes, bucket.url)


def _marks(sizes: dict[str, int]) -> list[str]:
    """The names of shards' marks."""
    return [n for n in sorted(sizes) if n.endswith(".parquet") and is_ours(n) and n not in _RESULTS]


def _remove_state(bucket: Bucket) -> None:
    """Remove the plan: first what says that there is one."""
    names = [name for name in bucket.details(WORK_NAME) if _STATE.fullmatch(name) or _ROWS.fullmatch(name)]
    bucket.remove(sorted(names, key=lambda name: name != _HEADER))


def _abandon(bucket: Bucket) -> None:
    """Nothing was kept, so nothing is to be continued: remove the marks of shards without samples."""
    sizes = bucket.sizes()
    if _HEADER in sizes:
        first = 0
        if (place := f"{WORK_NAME}/base/{PLACE_NAME}") in sizes:  # what was there before an append stays
            first = int(bucket.read(place, json.load)["first_shard"])
        tars = {name.removesuffix(".tar") for name in sizes if name.endswith(".tar")}
        empty = [name for name in _marks(sizes) if name.removesuffix(".parquet") not in tars]
        bucket.remove([n for n in empty if int(n.removesuffix(".parquet").rpartition("-")[2]) >= first])
        _remove_state(bucket)


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

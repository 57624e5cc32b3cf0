"""Tars at URLs as a source: each is read once, front to back, into buckets on disk, before it is planned.

`OUT/.pack/tars/` holds what remote_tar_task writes: `skeletons/000012.tar`, which lists as tar 12 does, and
`0007/0003`, the images of piece 3 that go to bucket 7 (see spill.py for such parts). `layout.json` tells of
which tars, in which versions: of any others all is read anew. A piece is a run of tars of 2 GB or more; one
that was whole when a run was killed is not read again. `0007.whole`: all shards of bucket 7 are whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from linerate.shards.engines import StoppedError, choose_num_workers, run_tasks
from linerate.shards.errors import UserError, show_bytes
from linerate.shards.fetch_options import FetchOptions
from linerate.shards.imagenet import LabelledSource
from linerate.shards.manifest import ManifestSource
from linerate.shards.out_folder import TARS_NAME
from linerate.shards.plan import Plan
from linerate.shards.plan_rows import load_plan_rows
from linerate.shards.remote_source import RemoteTars
from linerate.shards.remote_stream import RemoteFile, ask_file, download, find_file
from linerate.shards.remote_tar_task import RemoteTar, RemoteTarTask, bucket_of_key, skeleton_path
from linerate.shards.remote_url import show_url
from linerate.shards.sources import Source
from linerate.shards.spill_layout import BUCKET_BYTES, MAX_BUCKETS, MAX_PIECES, PIECE_BYTES, part_path
from linerate.shards.spill_task import load_index
from linerate.shards.tar_source import TarSource, key_prefixes

MANIFESTS_NAME = "manifests"
_LAYOUT_NAME = "layout.json"


class BroughtTars(TarSource):
    """Remote tars that were read: listed by their skeletons, called by their URLs."""

    def __init__(self, skeletons: list[Path], urls: list[str]) -> None:
        super().__init__(skeletons)
        self._prefixes = key_prefixes(urls)
        self._urls = urls

    @property
    def containers(self) -> Sequence[str]:
        return self._urls


def bring_source(
    source: Source | ManifestSource,
    work: Path,
    *,
    seed: int,
    num_workers: int | None,
    options: FetchOptions,
    on_progress: Callable[[str, float], None] = lambda stage, amount: None,
) -> Source | ManifestSource:
    """The source with all that listing it needs in `work`; one that lies here comes back as it is.

    on_progress: ("to fetch", bytes in all), then ("fetch", bytes since). Raises UserError for what cannot be
    read, or has no room.
    """
    if isinstance(source, LabelledSource):
        inner = bring_source(
            source.source,
            work,
            seed=seed,
            num_workers=num_workers,
            options=options,
            on_progress=on_progress,
        )
        assert not isinstance(inner, ManifestSource)
        return dataclasses.replace(source, source=inner)
    if isinstance(source, ManifestSource) and source.urls:
        return _bring_manifests(source, work / MANIFESTS_NAME, options, on_progress)
    if isinstance(source, RemoteTars):
        return _bring_tars(source, work / TARS_NAME, seed, num_workers, options, on_progress)
    return source


def is_unread(source: Source | ManifestSource) -> bool:
    """Must all of its bytes be read before it can be listed?"""
    return isinstance(source.source if isinstance(source, LabelledSource) else source, RemoteTars)


@dataclass(frozen=True, kw_only=True)
class TarsLayout:
    """Which remote tars lie in the buckets, and how they were cut."""

    seed: int
    tars: list[list[Any]]
    """[URL as it may be shown, bytes, version] of each."""
    num_buckets: int
    pieces: list[int]
    """Number of the first tar of each piece."""

    @classmethod
    def load(cls, folder: Path) -> TarsLayout | None:
        try:
            return cls(**json.loads((folder / _LAYOUT_NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    @property
    def starts(self) -> list[int]:
        """Where each tar begins when all are laid end to end, and where the last one ends."""
        return [0, *np.cumsum([size for _, size, _ in self.tars], dtype=np.int64).tolist()]


def _tars_of(plan: Plan) -> tuple[Path, TarsLayout] | None:
    """Where the remote tars of a plan were read to; None where it has none."""
    for work in (plan.folder, plan.folder.parent):  # a plan in the making lies one deeper
        layout = TarsLayout.load(work / TARS_NAME)
        if layout and [name for name, _, _ in layout.tars] == plan.containers:
            return work / TARS_NAME, layout
    return None


def find_in_tars(plan: Plan, table: Any) -> Iterator[tuple[Path, Any, Any]]:
    """(part, rows of a task's table that lie in it, their offsets there); none where no tars were brought.

    Raises UserError where a row that should be there is not.
    """
    found = _tars_of(plan)
    if found is None:
        return
    folder, layout = found
    keys = table.column("key").to_pylist()
    buckets = np.array([bucket_of_key(k, seed=layout.seed, num_buckets=layout.num_buckets) for k in keys])
    starts = np.array(layout.starts)
    container, offset = (table.column(name).to_numpy() for name in ("container", "offset"))
    address = starts[container] + offset
    pieces = np.searchsorted(layout.pieces, container, side="right") - 1
    for bucket in np.unique(buckets):
        for piece in np.unique(pieces[buckets == bucket]):
            (chosen,) = np.nonzero((buckets == bucket) & (pieces == piece))
            part = part_path(folder, int(bucket), int(piece))
            index = load_index(part)
            there = index is not None and len(index) > 0
            places = np.searchsorted(index[:-1, 0], address[chosen]) if there else None
            if places is None or not np.array_equal(index[places, 0], address[chosen]):
                raise UserError(
                    f"{part} lacks images of {layout.tars[int(container[chosen[0]])][0]}; remove {folder}, "
                    f"and the same command again reads the tars anew"
                )
            yield part, chosen, index[places, 1]


class TarBuckets:
    """Frees the disk space of brought tars: a bucket leaves when all shards that it has images of are whole.

    shards: of the plan, those that are not whole yet.
    """

    def __init__(self, plan: Plan, shards: Collection[int]) -> None:
        self._folder = plan.folder / TARS_NAME
        found = _tars_of(plan)
        self._waiting: dict[int, set[int]] = {}
        if found is None or found[0] != self._folder:  # a plan in the making will need them again
            return
        layout = found[1]
        self._waiting = {bucket: set() for bucket in range(layout.num_buckets)}
        for shard, table in enumerate(load_plan_rows(plan.folder)):
            if shard in shards:
                ends = [table.column("key")[row].as_py() for row in (0, len(table) - 1)]
                first, last = (
                    bucket_of_key(key, seed=layout.seed, num_buckets=layout.num_buckets) for key in ends
                )
                for bucket in range(first, last + 1):
                    self._waiting[bucket].add(shard)
        self._free()

    def shard_is_whole(self, shard: int) -> None:
        for shards in self._waiting.values():
            shards.discard(shard)
        self._free()

    def _free(self) -> None:
        for bucket in [bucket for bucket, shards in self._waiting.items() if not shards]:
            del self._waiting[bucket]
            # First what says that nobody needs it: killed in between, it is not read again.
            _whole_path(self._folder, bucket).touch()
            shutil.rmtree(self._folder / f"{bucket:04d}", ignore_errors=True)


def _whole_path(folder: Path, bucket: int) -> Path:
    return folder / f"{bucket:04d}.whole"


def _bring_manifests(
    source: ManifestSource,
    folder: Path,
    options: FetchOptions,
    on_progress: Callable[[str, float], None],
) -> ManifestSource:
    shutil.rmtree(folder, ignore_errors=True)
    found = [ask_file(url, options) for url in source.urls]
    num_bytes = sum(file.size for file in found)
    _require_space(folder.parent, num_bytes, what=f"the manifest {show_url(source.urls[0])}")
    on_progress("to fetch", num_bytes)
    files: list[Path] = []
    numbers: dict[str, int] = {}
    for file in found:
        base, _, name = show_url(file.url).rpartition("/")
        # Manifests of one place lie in one folder, as their relative paths have one base.
        here = folder / f"{numbers.setdefault(base, len(numbers)):06d}"
        here.mkdir(parents=True, exist_ok=True)
        files.append(here / f"{len(files):06d}-{_plain(name)}")
        download(file, files[-1], options, on_bytes=lambda size: on_progress("fetch", size))
    return dataclasses.replace(source, files=files)


def _plain(name: str) -> str:
    """The end of a name from elsewhere, which tells its kind, without what means something here."""
    return "".join(sign if sign.isalnum() or sign in ".-_" else "_" for sign in name)[-80:]


def _bring_tars(
    source: RemoteTars,
    folder: Path,
    seed: int,
    num_workers: int | None,
    options: FetchOptions,
    on_progress: Callable[[str, float], None],
) -> BroughtTars:
    with ThreadPoolExecutor(min(options.in_flight, 16)) as pool:
        files = list(pool.map(lambda url: ask_file(url, options), source.urls))
    layout = _make_layout(files, seed)
    if TarsLayout.load(folder) != layout:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        temp = folder / f".{_LAYOUT_NAME}.tmp"
        temp.write_text(json.dumps(vars(layout)), encoding="utf-8")
        temp.replace(folder / _LAYOUT_NAME)
    for temp in folder.glob("*/.*.tmp"):
        temp.unlink(missing_ok=True)
    tasks = _missing(folder, layout, files, options)
    num_bytes = sum(
        tar.file.size * len(task.buckets) // layout.num_buckets for task in tasks for tar in task.tars
    )
    _require_space(folder, num_bytes, what="what is read of the tars, until the shards are whole,")
    if tasks:
        _read(tasks, num_workers, num_bytes, on_progress)
    _bring_tables(folder, source.urls, options)
    skeletons = [skeleton_path(folder, number) for number in range(len(files))]
    return BroughtTars(skeletons, source.containers)


def _make_layout(files: list[RemoteFile], seed: int) -> TarsLayout:
    total = sum(file.size for file in files)
    least = max(PIECE_BYTES, -(-total // MAX_PIECES))
    pieces, filled = [0], 0
    for number, file in enumerate(files):
        if filled >= least:
            pieces.append(number)
            filled = 0
        filled += file.size
    return TarsLayout(
        seed=seed,
        tars=[[show_url(file.url), file.size, file.version] for file in files],
        num_buckets=min(MAX_BUCKETS, max(1, -(-total // BUCKET_BYTES))),
        pieces=pieces,
    )


def _missing(
    folder: Path, layout: TarsLayout, files: list[RemoteFile], options: FetchOptions
) -> list[RemoteTarTask]:
    starts, prefixes = layout.starts, key_prefixes([name for name, _, _ in layout.tars])
    tasks = []
    for piece, first in enumerate(layout.pieces):
        last = layout.pieces[piece + 1] if piece + 1 < len(layout.pieces) else len(files)
        numbers = range(first, last)
        buckets = [
            bucket
            for bucket in range(layout.num_buckets)
            if not part_path(folder, bucket, piece).exists() and not _whole_path(folder, bucket).exists()
        ]
        if buckets or not all(skeleton_path(folder, number).exists() for number in numbers):
            tars = tuple(
                RemoteTar(file=files[n], prefix=prefixes[n], start=starts[n], number=n) for n in numbers
            )
            tasks.append(
                RemoteTarTask(
                    folder=os.fspath(folder),
                    piece=piece,
                    buckets=tuple(buckets),
                    num_buckets=layout.num_buckets,
                    tars=tars,
                    seed=layout.seed,
                    options=options,
                )
            )
    return tasks


def _read(
    tasks: list[RemoteTarTask],
    num_workers: int | None,
    num_bytes: int,
    on_progress: Callable[[str, float], None],
) -> None:
    workers = choose_num_workers(num_workers, num_bytes=num_bytes, may_crash=False)
    on_progress("to fetch", sum(tar.file.size for task in tasks for tar in task.tars))
    try:
        failures = run_tasks(
            "linerate.shards.remote_tar_task:run_task",
            tasks,
            num_workers=workers,
            on_done=lambda index, result: None,
            on_progress=lambda size: on_progress("fetch", size),
        )
    except StoppedError as stop:
        raise UserError(stop.failure.text) from None
    if failures:
        failure = next(iter(failures.values()))
        raise UserError(
            f"{len(failures)} of {len(tasks)} runs of tars could not be read in three attempts "
            f"({failure.kind}: {failure.text}); the same command again reads only those"
        )


def _bring_tables(folder: Path, urls: tuple[str, ...], options: FetchOptions) -> None:
    """What img2dataset's tables beside its tars say it could not fetch; most tars have none."""

    def bring(number: int, url: str) -> None:
        path = skeleton_path(folder, number).with_suffix(".parquet")
        if file := find_file(f"{url.removesuffix('.tar')}.parquet", options):
            download(file, path, options)

    with ThreadPoolExecutor(min(options.in_flight, 16)) as pool:
        for done in [pool.submit(bring, *pair) for pair in enumerate(urls) if pair[1].endswith(".tar")]:
            done.result()


def _require_space(folder: Path, num_bytes: int, *, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise UserError(
            f"{what} takes {show_bytes(num_bytes)}, the disk of {folder} has {show_bytes(free)} free; free "
            f"some, or give an OUT (where that is a URL, a --staging) on another disk"
        )

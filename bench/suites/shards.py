"""Packing shards, on one core, with inputs and outputs in the scratch folder (tmpfs if there is).

Peers are what people use today: webdataset's ShardWriter, `cat`, Pillow's load as a check.
"""

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from linerate.bench.contest import Bar, Ceiling, Contest, Disagreement, Setting
from linerate.bench.images import ImageFolder, copy_folder, load_images
from linerate.bench.peers import missing_peer
from linerate.bench.suites.shard_peers import (
    copy_and_hash,
    require_same_samples,
    tar_samples,
    write_with_webdataset,
)
from linerate.bench.suites.stream_peers import against_writers
from linerate.bench.timing import Side, one_core
from linerate.shards.catalog import Catalog
from linerate.shards.options import PackOptions
from linerate.shards.pack import pack
from linerate.shards.pack_shard import ShardTask, finish_shard, pack_shard
from linerate.shards.plan import make_plan
from linerate.shards.shard_stats import STATS_NAME
from linerate.shards.sources import open_source

# One tar on both sides, as ShardWriter makes it of so few images.
ONE_SHARD = PackOptions(min_shards=1, shard_samples=1_000_000)


def bench_pack(setting: Setting) -> Iterator[Contest]:
    """Folder -> shard, header-checked, no re-encode: against ShardWriter and against `cat`."""
    images = scratch_images(setting, setting.pick(tiny=20, quick=500, full=4000))
    with one_core():
        yield from _pack_contests(setting, images, full_size=setting.size == "full")
    # At a smaller size starting the processes would be most of the time.
    if len(os.sched_getaffinity(0)) > 1 and setting.size == "full":
        yield two_processes(setting, images)


def bench_pack_small(setting: Setting) -> Iterator[Contest]:
    """The same with members of 5 KB, where the work per member is all there is."""
    num_images = setting.pick(tiny=20, quick=1000, full=10_000)
    small = load_images(None, num_images=num_images, num_bytes=5_000)
    images = copy_folder(small, setting.scratch / "small")
    with one_core():
        bar = Bar(5.0, full_size=setting.size == "full")
        yield against_shard_writer(setting, images, ONE_SHARD, bar)


def _pack_contests(setting: Setting, images: ImageFolder, *, full_size: bool) -> Iterator[Contest]:
    yield against_shard_writer(setting, images, ONE_SHARD, Bar(3.0, full_size=full_size))
    yield against_shard_writer(setting, images, ONE_SHARD, None, planned=True)
    ours, joined = setting.scratch / "ours", setting.scratch / "joined"
    listed = b"\0".join(os.fsencode(path) for path in images.files)

    def cat() -> None:
        with joined.open("wb") as out:
            subprocess.run(["xargs", "-0", "cat", "--"], input=listed, stdout=out, check=True)

    def agree() -> str:
        pack_images(images, ours, ONE_SHARD)
        cat()
        in_ours = sum(len(jpeg) for jpeg, _ in tar_samples(ours))
        if in_ours != joined.stat().st_size:
            raise Disagreement(
                f"the tar holds {in_ours:,} bytes of images, `cat` wrote {joined.stat().st_size:,}"
            )
        return "the bytes of images written"

    yield Contest(
        peer="cat of the same files",
        work=pack_work(images, ONE_SHARD),
        unit="images/s",
        amount=len(images.files),
        ours=Side(run=lambda: pack_images(images, ours, ONE_SHARD), prepare=lambda: remove(ours)),
        theirs=Side(run=cat, prepare=lambda: remove(joined)),
        agree=agree,
        bar=Bar(0.7, full_size=full_size),
        ceiling=bare_loop(images, joined),
        note="listing and planning are in our time, starting xargs and cat in theirs",
    )
    yield from against_stream_writers(setting, images)


def against_stream_writers(setting: Setting, images: ImageFolder) -> Iterator[Contest]:
    """The writers of other formats, on the core that the caller has."""
    ours = setting.scratch / "ours"

    def our_samples() -> list[tuple[bytes, int]]:
        pack_images(images, ours, ONE_SHARD)
        return tar_samples(ours)

    yield from against_writers(
        images,
        setting.scratch,
        ours=Side(run=lambda: pack_images(images, ours, ONE_SHARD), prepare=lambda: remove(ours)),
        our_samples=our_samples,
        work=pack_work(images, ONE_SHARD),
        unit="images/s",
        amount=len(images.files),
        ceiling=bare_loop(images, setting.scratch / "joined"),
    )


def bare_loop(images: ImageFolder, out: Path) -> Ceiling:
    """What a packer in Python cannot beat: no list, no plan, no check, no header and no index."""
    return Ceiling(
        name="open + read + hash twice + write, in Python",
        side=Side(run=lambda: copy_and_hash(images, out), prepare=lambda: remove(out)),
    )


def against_shard_writer(
    setting: Setting,
    images: ImageFolder,
    options: PackOptions,
    bar: Bar | None,
    *,
    check: Callable[[bytes], object] | None = None,
    planned: bool = False,
    ceiling: Ceiling | None = None,
) -> Contest:
    """ceiling: None is the bare loop.

    planned: listing and planning are done before the clock starts, as the peer's list of files is."""
    ours, theirs = setting.scratch / "ours", setting.scratch / "theirs"
    run_ours = (
        _planned_pack(setting, images, options) if planned else partial(pack_images, images, ours, options)
    )
    missing = missing_peer("webdataset")

    def run_theirs() -> None:
        write_with_webdataset(images, theirs, check=check)

    def empty_ours() -> None:
        remove(ours)
        if planned:
            ours.mkdir()

    def empty_theirs() -> None:
        remove(theirs)
        theirs.mkdir()

    def agree() -> str:
        empty_ours()
        run_ours()
        empty_theirs()
        run_theirs()
        return require_same_samples(tar_samples(ours), tar_samples(theirs))

    return Contest(
        peer=f"webdataset ShardWriter{' + Pillow load' if check else ''}, jpg + cls",
        work=pack_work(images, options) + (", listed and planned before" if planned else ""),
        unit="images/s",
        amount=len(images.files),
        ours=Side(run=run_ours, prepare=empty_ours),
        theirs=None if missing else Side(run=run_theirs, prepare=empty_theirs),
        missing=missing,
        agree=agree,
        bar=bar,
        ceiling=ceiling or bare_loop(images, ours),
        note=None if planned else "listing and planning are in our time; the peer is fed the list of files",
    )


def two_processes(setting: Setting, images: ImageFolder) -> Contest:
    many = setting.scratch / "many"
    copies = setting.pick(tiny=2, quick=2, full=4)
    for path in images.files:
        for copy in range(copies):
            link = many / path.parent.name / f"{copy}-{path.name}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.hardlink_to(path)
    ours, theirs = setting.scratch / "ours", setting.scratch / "theirs"
    options = PackOptions(min_shards=16)

    def agree() -> str:
        remove(ours)
        remove(theirs)
        pack(many, ours, options=options, num_workers=2)
        pack(many, theirs, options=options, num_workers=1)
        written = [path for path in sorted(ours.iterdir()) if path.name != STATS_NAME]
        differ = [p.name for p in written if p.read_bytes() != (theirs / p.name).read_bytes()]
        if differ:
            raise Disagreement(f"two processes wrote other bytes than one: {', '.join(differ[:3])}")
        return "every byte of every file written"

    num_images = copies * len(images.files)
    return Contest(
        peer="the same in one process",
        work=f"{num_images:,} JPEGs of {images.mean_kb} KB -> 16 shards, header check, two processes",
        unit="images/s",
        amount=num_images,
        ours=Side(run=lambda: pack(many, ours, options=options, num_workers=2), prepare=lambda: remove(ours)),
        theirs=Side(
            run=lambda: pack(many, theirs, options=options, num_workers=1), prepare=lambda: remove(theirs)
        ),
        agree=agree,
        bar=Bar(1.8, full_size=setting.size == "full"),
        no_ceiling="twice one process is 2x",
        note="starting the worker processes is in both times",
    )


def scratch_images(setting: Setting, num_images: int, *, multiple_of: int = 1) -> ImageFolder:
    """The benchmark images in the scratch folder; a multiple, so that whole batches hold all of them."""
    target = setting.scratch / "images"
    remove(target)
    images = load_images(setting.images, num_images=num_images)
    kept = len(images.files) // multiple_of * multiple_of or len(images.files)
    return copy_folder(dataclasses.replace(images, files=images.files[:kept]), target)


def pack_work(images: ImageFolder, options: PackOptions) -> str:
    return (
        f"{len(images.files):,} JPEGs of {images.mean_kb} KB -> tar + idx + parquet + xxh3, "
        f"{options.check} check, one core"
    )


def pack_images(images: ImageFolder, out: Path, options: PackOptions) -> Catalog:
    remove(out)
    return pack(images.root, out, options=options, num_workers=0)


def _planned_pack(setting: Setting, images: ImageFolder, options: PackOptions) -> Callable[[], object]:
    """Writes the one shard of a plan that is made here and now."""
    folder = setting.scratch / "plan"
    remove(folder)
    folder.mkdir()
    source = open_source([images.root])
    make_plan(source, folder, seed=options.seed, sizing=options.sizing, options=dataclasses.asdict(options))
    task = ShardTask(
        plan_folder=os.fspath(folder),
        shard=0,
        out=os.fspath(setting.scratch / "ours"),
        name=options.name,
        policy=options.policy,
    )
    return lambda: finish_shard(pack_shard(task))


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

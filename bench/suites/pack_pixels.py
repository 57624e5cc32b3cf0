"""Packing that looks at pixels, on one core: each image is decoded as a check, or shrunk."""

import os
from collections.abc import Callable, Iterator
from functools import partial

import simplejpeg

from linerate.bench.contest import Bar, Ceiling, Contest, Setting
from linerate.bench.images import ImageFolder
from linerate.bench.peers import missing_peer, open_peer
from linerate.bench.suites import shard_resizers as peers
from linerate.bench.suites.shard_peers import load_with_pillow
from linerate.bench.suites.shards import against_shard_writer, pack_images, pack_work, remove, scratch_images
from linerate.bench.timing import Side, one_core
from linerate.shards.catalog import Catalog
from linerate.shards.options import PackOptions

SHORT_SIDE = 256
QUALITY = 90
CHECKED = PackOptions(min_shards=1, shard_samples=1_000_000, check="decode")
SHRUNK = PackOptions(min_shards=1, shard_samples=1_000_000, resize=SHORT_SIDE, quality=QUALITY)
# Photos so large that their JPEG is decoded to a half are sharper than Pillow makes them; and img2dataset
# averages areas. Different images lie at 10 dB from one another.
WORST_DB = {"pillow": 25.0, "img2dataset": 20.0}
LEAST_DB = {"pillow": 35.0, "img2dataset": 28.0}


def bench_pack_full(setting: Setting) -> Iterator[Contest]:
    """Folder -> shard, each image decoded strictly: against Pillow's load + ShardWriter, and img2dataset."""
    images = scratch_images(setting, setting.pick(tiny=20, quick=60, full=600))
    bar = Bar(1.4, full_size=setting.size == "full")
    with one_core():
        ceiling = decode_of(images, CHECKED)
        yield against_shard_writer(setting, images, CHECKED, bar, check=load_with_pillow, ceiling=ceiling)
        yield from _against_img2dataset(setting, images, CHECKED, work=pack_work(images, CHECKED), bar=1.4)


def bench_pack_256(setting: Setting) -> Iterator[Contest]:
    """Folder -> shard of images with a short side of 256: against Pillow + ShardWriter, and img2dataset."""
    images = scratch_images(setting, setting.pick(tiny=8, quick=40, full=300))
    with one_core():
        yield _against_pillow(setting, images)
        yield from _against_img2dataset(setting, images, SHRUNK, work=_work(images), bar=1.6)


def _against_pillow(setting: Setting, images: ImageFolder) -> Contest:
    theirs = setting.scratch / "theirs"
    missing = missing_peer("webdataset")

    def run_theirs() -> None:
        peers.write_shrunk(images, theirs, resize=SHORT_SIDE, quality=QUALITY)

    return _contest(
        setting,
        images,
        SHRUNK,
        peer="Pillow, bilinear + webdataset ShardWriter",
        work=_work(images),
        run_theirs=None if missing else run_theirs,
        agree=partial(peers.require_alike, least_db=LEAST_DB["pillow"], worst_db=WORST_DB["pillow"]),
        bar=1.5,
        missing=missing,
        note=None,
    )


def _against_img2dataset(
    setting: Setting, images: ImageFolder, options: PackOptions, *, work: str, bar: float
) -> Iterator[Contest]:
    """One contest: shrinking where the options do, else its `skip_reencode`, which decodes as a check."""
    missing = missing_peer("img2dataset")
    job = {
        "files": [os.fspath(path) for path in images.files],
        "labels": list(images.labels),
        "out": os.fspath(setting.scratch / "theirs"),
        "resize": options.resize,
        "quality": options.quality,
    }
    contest = partial(
        _contest,
        setting,
        images,
        options,
        peer=f"img2dataset, in-shard{'' if options.resize else ', skip_reencode'}",
        work=work,
        bar=bar,
        agree=partial(
            peers.require_alike, least_db=LEAST_DB["img2dataset"], worst_db=WORST_DB["img2dataset"]
        ),
        note="its decode, resize and writer alone: neither downloads nor the hashes and EXIF that it reads",
    )
    if missing:
        yield contest(run_theirs=None, missing=missing)
        return
    with open_peer("img2dataset") as ask:
        yield contest(run_theirs=lambda: ask("write_img2dataset", **job), missing=None)


def _contest(
    setting: Setting,
    images: ImageFolder,
    options: PackOptions,
    *,
    peer: str,
    work: str,
    run_theirs: Callable[[], None] | None,
    agree: Callable[[dict[int, bytes], dict[int, bytes]], str],
    bar: float,
    missing: str | None,
    note: str | None,
) -> Contest:
    ours, theirs = setting.scratch / "ours", setting.scratch / "theirs"

    def run_ours() -> Catalog:
        return pack_images(images, ours, options)

    def empty_theirs() -> None:
        remove(theirs)
        theirs.mkdir()

    def run_agree() -> str:
        catalog = run_ours()
        empty_theirs()
        assert run_theirs is not None
        run_theirs()
        return agree(peers.our_images(catalog, images), peers.their_images(theirs))

    return Contest(
        peer=peer,
        work=work,
        unit="images/s",
        amount=len(images.files),
        ours=Side(run=run_ours, prepare=lambda: remove(ours)),
        theirs=Side(run=run_theirs, prepare=empty_theirs) if run_theirs else None,
        missing=missing,
        agree=run_agree,
        bar=Bar(bar, full_size=setting.size == "full"),
        ceiling=decode_of(images, options),
        note=note,
    )


def decode_of(images: ImageFolder, options: PackOptions) -> Ceiling:
    """Every file decoded as far as the options need, and nothing resized or written."""

    def check() -> None:
        for path in images.files:
            simplejpeg.decode_jpeg(path.read_bytes(), "GRAY", True, True, 1, 1, 8)

    def shrink(least: int) -> None:
        for path in images.files:
            jpeg = path.read_bytes()
            height, width, *_ = simplejpeg.decode_jpeg_header(jpeg)
            factor = next((f for f in (8, 4, 2) if min(height, width) // f >= least), 1)
            sides = (height // factor, width // factor) if factor > 1 else (0, 0)
            simplejpeg.decode_jpeg(jpeg, "RGB", False, False, *sides, factor)

    if options.resize is None:
        return Ceiling(name="decode of every file to an eighth, gray", side=Side(run=check))
    return Ceiling(name="decode of every file", side=Side(run=partial(shrink, options.resize)))


def _work(images: ImageFolder) -> str:
    return (
        f"{len(images.files):,} JPEGs of {images.mean_kb} KB -> short side {SHORT_SIDE}, quality {QUALITY} "
        f"-> tar + idx + parquet + xxh3, one core"
    )

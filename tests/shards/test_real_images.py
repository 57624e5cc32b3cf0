"""The real images: awkward and broken files, photos, and CIFAR-10's tars."""

import csv
import functools
import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.shards.three_decoders import pillow_pixels, sizes

from linerate.shards.catalog import Catalog
from linerate.shards.inspect_image import (
    NOT_BASELINE,
    ORIENTED,
    RESIZED,
    TRANSCODED,
    RejectedError,
    check_header,
)
from linerate.shards.options import PackOptions
from linerate.shards.pack import pack
from linerate.shards.reencode import target_size
from linerate.shards.segments import jpeg_orientation, strip_metadata
from linerate.shards.verify import verify_shards

pytestmark = pytest.mark.data

# The header says nothing of damage behind it; DALI itself takes all but these.
HEADER_TAKES_WHAT_DALI_REFUSES = {
    "derived_corrupt/crab_crlf_mangled.jpg",
    "fuzz/5dc71b1d868ef137394d3cc23abea65a.jpg",
    "fuzz/adcb34b94f4c839bdd29037419a0ee53.jpg",
    "truncated/truncated_app14.jpg",
}


@pytest.fixture(scope="module")
def dali_decodes(data_folder: Path) -> dict[str, bool]:
    """Which of the nasty files DALI was seen to decode."""
    with (data_folder / "nasty_decoders.csv").open() as file:
        return {row["path"]: row["dali"] == "True" for row in csv.DictReader(file)}


POLICIES = {
    "header": PackOptions(),
    "decode": PackOptions(check="decode"),
    "dali": PackOptions(check="dali"),
    "baseline": PackOptions(baseline=True),
    "resize": PackOptions(resize=256),
    "strip": PackOptions(strip_exif=True),
    "all": PackOptions(baseline=True, resize=256, strip_exif=True, icc="srgb", check="decode"),
}
DAMAGED = {
    # DALI passes over a segment whose length makes no sense, and over a marker that damage made.
    "corrupt/broken-bogus-segment-length.jpg",
    "derived_corrupt/crab_64_bits_flipped.jpg",
    # It refuses stray bytes between segments, which libjpeg passes over.
    "derived_corrupt/crab_crlf_mangled.jpg",
    "truncated/truncated_app14.jpg",
    # Headers without a sensible image behind them.
    "fuzz/5dc71b1d868ef137394d3cc23abea65a.jpg",
    "fuzz/adcb34b94f4c839bdd29037419a0ee53.jpg",
}
# Packed, though not all three decoders take it. The header says nothing of damage behind it. With --baseline
# and --resize what is written anew is read whole; what keeps its bytes is not, so they are no strict checks.
DECODERS_DISAGREE = {
    "header": DAMAGED,
    "decode": set(),
    "dali": {name for name in DAMAGED if "bogus" in name or "64_bits" in name},
    "baseline": {name for name in DAMAGED if "fuzz" not in name},
    "resize": {name for name in DAMAGED if "app14" in name or "adcb34" in name},
    # Without its stray bytes DALI takes what it refused.
    "strip": {name for name in DAMAGED if "crlf" not in name and "app14" not in name},
    "all": set(),
}
REASONS = {
    "cut short", "broken header", "no dimensions", "too many pixels", "empty", "not a JPEG", "not an image",
    "hidden", "unsupported coding", "does not decode", "does not decode in DALI",
}  # fmt: skip


# What the header check calls a format, by what it is called in the list of the files.
TRUE_FORMATS = {
    "PNG": "PNG", "GIF": "GIF", "WebP": "WEBP", "BMP": "BMP", "TIFF": "TIFF", "PNM": "PNM", "ICO": "ICO",
    "AVIF or HEIC": "ISOBMFF:avif",
}  # fmt: skip
REFUSED_BY_DALI = {
    "cut short", "broken header", "no dimensions", "unsupported coding", "does not decode in DALI",
}  # fmt: skip


@pytest.fixture(scope="module")
def nasty_facts(data_folder: Path) -> dict[str, dict[str, str]]:
    """The row of each nasty file in the list of them: its true format, size, pixels."""
    with (data_folder / "nasty.csv").open() as file:
        return {row["path"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def nasty(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Catalog]:
    """The nasty files packed under a policy of POLICIES."""

    @functools.cache
    def pack_under(policy: str) -> Catalog:
        out = tmp_path_factory.mktemp(policy) / "out"
        return pack(data_folder / "nasty", out, options=POLICIES[policy], num_workers=0)

    return pack_under


def stored(catalog: Catalog) -> Iterator[tuple[dict[str, Any], bytes]]:
    """(row of the .parquet, JPEG) of every sample."""
    for shard in range(catalog.num_shards):
        tar = catalog.shard_path(shard).read_bytes()
        for row in catalog.load_table(shard).to_pylist():
            yield row, tar[row["offset"] : row["offset"] + row["size"]]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_nasty_file_is_packed_or_rejected_with_a_reason(
    data_folder: Path, nasty: Callable[[str], Catalog], policy: str
) -> None:
    source, catalog = data_folder / "nasty", nasty(policy)
    rows = pq.read_table(catalog.root / "rejected.parquet").to_pylist()
    packed = {row["key"] for row, _ in stored(catalog)}
    rejected = {row["key"] for row in rows}
    assert packed | rejected == {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()}
    assert not packed & rejected
    assert {row["reason"] for row in rows} <= REASONS
    assert all(row["detail"] for row in rows)
    assert verify_shards(catalog, decode="header", num_workers=0).ok


@pytest.mark.parametrize("policy", POLICIES)
def test_each_reason_fits_what_others_found_in_the_file(
    nasty_facts: dict[str, dict[str, str]],
    dali_decodes: dict[str, bool],
    nasty: Callable[[str], Catalog],
    policy: str,
) -> None:
    rows = pq.read_table(nasty(policy).root / "rejected.parquet").to_pylist()
    why = {row["key"]: (row["reason"], row["detail"]) for row in rows}
    for key, facts in nasty_facts.items():
        reason, detail = why.get(key, ("", ""))
        named, known = TRUE_FORMATS.get(detail), facts["true_format"]
        pixels = int(facts["width"] or 0) * int(facts["height"] or 0)
        assert (reason == "hidden") == Path(key).name.startswith("."), key
        assert (reason == "empty") == (facts["bytes"] == "0"), key
        if reason == "not a JPEG":
            assert known == named if named else known not in ("JPEG", *TRUE_FORMATS.values()), (key, known)
        if pixels > 100_000_000 and known == "JPEG":
            assert reason in ("too many pixels", "unsupported coding"), key
        if reason == "too many pixels":
            assert pixels > 100_000_000 or known != "JPEG", key
        if reason in REFUSED_BY_DALI and known == "JPEG":
            assert not dali_decodes[key], (key, reason)
        if reason == "does not decode":
            assert POLICIES[policy].check == "decode" or POLICIES[policy].rewrites, key
        if reason == "does not decode in DALI":
            assert POLICIES[policy].check == "dali", key


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_packed_decodes_to_one_size_in_pillow_torchvision_and_dali(
    nasty: Callable[[str], Catalog], policy: str
) -> None:
    disagree = {
        row["key"]
        for row, jpeg in stored(nasty(policy))
        if set(sizes(jpeg).values()) != {(row["height"], row["width"])}
    }
    assert disagree == DECODERS_DISAGREE[policy]


def test_what_a_policy_adds_and_takes_away(nasty: Callable[[str], Catalog]) -> None:
    assert {policy: nasty(policy).num_samples for policy in POLICIES} == {
        "header": 90,
        "decode": 73,
        "dali": 86,
        "baseline": 110,  # 25 of other formats, less 5 that are damaged and would have to be written anew
        "resize": 82,
        "strip": 90,
        "all": 98,
    }


def test_with_baseline_everything_packed_is_baseline_and_upright(nasty: Callable[[str], Catalog]) -> None:
    for row, jpeg in stored(nasty("baseline")):
        assert not row["flags"] & (NOT_BASELINE | ORIENTED), row["key"]
        assert check_header(jpeg, max_pixels=10**8).flags == row["flags"] & 0x3FF


def test_with_strip_no_metadata_is_left_and_no_pixel_differs(nasty: Callable[[str], Catalog]) -> None:
    before = {row["key"]: jpeg for row, jpeg in stored(nasty("header"))}
    for row, jpeg in stored(nasty("strip")):
        assert strip_metadata(jpeg) == jpeg
        assert jpeg_orientation(jpeg) == jpeg_orientation(before[row["key"]])
        for secret in (b"http://ns.adobe.com", b"Photoshop 3.0", b"JFXX", b"MPF\0"):
            assert secret not in jpeg, row["key"]
        if row["height"] * row["width"] < 10**7 and isinstance(sizes(before[row["key"]])["pillow"], tuple):
            assert (pillow_pixels(jpeg) == pillow_pixels(before[row["key"]])).all(), row["key"]


def test_the_header_check_agrees_with_dali_but_for_hidden_damage(
    data_folder: Path, dali_decodes: dict[str, bool]
) -> None:
    taken = set()
    for path in sorted((data_folder / "nasty").rglob("*")):
        if path.is_file():
            try:
                check_header(path.read_bytes(), max_pixels=100_000_000)
            except RejectedError as reject:
                if reject.reason not in ("not a JPEG", "too many pixels"):
                    assert not dali_decodes.get(str(path.relative_to(data_folder / "nasty"))), path
            else:
                taken.add(str(path.relative_to(data_folder / "nasty")))
    refused = {key for key in taken if not dali_decodes.get(key)}
    assert refused == HEADER_TAKES_WHAT_DALI_REFUSES


@pytest.fixture(scope="module")
def photos(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 photos in class folders."""
    root = tmp_path_factory.mktemp("photos")
    for name in (data_folder / "photos_subset25.txt").read_text().split()[:40]:
        source = data_folder / "photos" / name
        target = root / source.parent.name / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)
    return root


def test_photos_come_through_untouched(photos: Path, tmp_path: Path) -> None:
    catalog = pack(photos, tmp_path / "out", options=PackOptions(check="decode"), num_workers=0)
    assert catalog.num_samples == 40
    for row, jpeg in stored(catalog):
        assert jpeg == (photos / row["key"]).read_bytes()


@pytest.mark.parametrize("options", [{"strip_exif": True}, {"baseline": True}, {"resize": 256}])
def test_photos_come_through_every_policy_with_their_pixels(
    photos: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    catalog = pack(photos, tmp_path / "out", options=PackOptions(**options), num_workers=0)
    assert catalog.num_samples == 40
    distances = []
    for row, jpeg in stored(catalog):
        with Image.open(photos / row["key"]) as image:
            expected = image.convert("RGB")
        size = target_size(*expected.size, options.get("resize"))
        if row["flags"] & (RESIZED | TRANSCODED):
            encoded = io.BytesIO()
            expected.resize(size, Image.Resampling.BILINEAR).save(encoded, "JPEG", quality=90)
            expected = Image.open(encoded)
        now = Image.open(io.BytesIO(jpeg)).convert("RGB")
        assert now.size == size
        distances.append(np.abs(np.array(expected).astype(int) - np.array(now).astype(int)).mean())
    # Grey levels. What is decoded to a half before it is shrunk is sharper than by Pillow's filter.
    assert (
        (max(distances) < 8 and np.mean(distances) < 1.5)
        if "strip_exif" not in options
        else not any(distances)
    )


def test_one_stem_in_every_class_of_a_cifar_tar_is_ten_samples(data_folder: Path, tmp_path: Path) -> None:
    with (
        tarfile.open(data_folder / "cifar10-test.tar") as archive,
        tarfile.open(tmp_path / "c.tar", "w") as cut,
    ):
        for member in archive:
            if member.name.endswith("/0007.jpg"):
                cut.addfile(member, archive.extractfile(member))
    catalog = pack(tmp_path / "c.tar", tmp_path / "out", num_workers=0)
    keys = [key for shard in range(catalog.num_shards) for key in catalog.keys(shard)]
    assert len(set(keys)) == catalog.num_samples == 10
    assert sorted(label for s in range(catalog.num_shards) for label in catalog.shard_index(s).label) == list(
        range(10)
    )
    assert catalog.class_names[:3] == ("airplane", "automobile", "bird")

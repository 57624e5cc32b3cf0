"""The real images: awkward and broken files, photos, and CIFAR-10's tars."""

import csv
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from linerate.shards.inspect_image import RejectedError, check_header
from linerate.shards.options import Check, PackOptions
from linerate.shards.pack import pack
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


@pytest.mark.parametrize("check", ["header", "decode"])
def test_every_nasty_file_is_packed_or_rejected_with_a_reason(
    data_folder: Path, tmp_path: Path, check: Check
) -> None:
    source = data_folder / "nasty"
    catalog = pack(source, tmp_path / "out", options=PackOptions(check=check), num_workers=0)
    rows = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    packed = {key for shard in range(catalog.num_shards) for key in catalog.keys(shard)}
    rejected = {row["key"] for row in rows}
    assert packed | rejected == {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()}
    assert not packed & rejected
    assert all(row["reason"] and row["detail"] for row in rows)
    assert verify_shards(catalog, decode="header", num_workers=0).ok


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


def test_photos_come_through_untouched(data_folder: Path, tmp_path: Path) -> None:
    subset = (data_folder / "photos_subset25.txt").read_text().split()[:40]
    for name in subset:
        source = data_folder / "photos" / name
        target = tmp_path / "in" / source.parent.name / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)
    catalog = pack(tmp_path / "in", tmp_path / "out", options=PackOptions(check="decode"), num_workers=0)
    assert catalog.num_samples == len(subset)
    for shard in range(catalog.num_shards):
        index, stored = catalog.shard_index(shard), catalog.shard_path(shard).read_bytes()
        for row, key in enumerate(catalog.keys(shard)):
            start = int(index.offset[row])
            assert stored[start : start + int(index.size[row])] == (tmp_path / "in" / key).read_bytes()


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

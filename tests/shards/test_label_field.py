"""Classes out of a field of the .json beside each image of a tar."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from linerate.__main__ import main
from linerate.shards import scan
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.label_field import parse_label
from linerate.shards.options import PackOptions
from linerate.shards.pack import pack

MakeJpeg = Callable[..., bytes]
NAMED = PackOptions(label_column="breed")


@pytest.fixture
def make_tar(tmp_path: Path, make_jpeg: MakeJpeg) -> Callable[..., Path]:
    """A tar of one image for each document: its .json, or none where that is None; members as they are."""

    def make(*documents: Any, **members: bytes) -> Path:
        path = tmp_path / "in.tar"
        with tarfile.open(path, "w") as archive:
            for number, document in enumerate(documents):
                add(archive, f"{number:03d}.jpg", make_jpeg(number))
                if document is not None:
                    text = document if isinstance(document, bytes) else json.dumps(document).encode()
                    add(archive, f"{number:03d}.json", text)
            for name, data in members.items():
                add(archive, name.replace("_", "."), data)
        return path

    return make


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def labels(catalog: Catalog) -> Mapping[str, str | None]:
    """Key without its suffix -> name of the class."""
    return {
        row["key"][:3]: catalog.class_names[row["label"]] if row["label"] >= 0 else None
        for shard in range(catalog.num_shards)
        for row in catalog.load_table(shard, ["key", "label"]).to_pylist()
    }


def test_classes_are_the_sorted_names_of_the_field(make_tar: Callable[..., Path], tmp_path: Path) -> None:
    tar = make_tar({"breed": "poodle"}, {"breed": " akita "}, {"breed": "poodle", "age": 3})
    catalog = pack(tar, tmp_path / "out", options=NAMED, num_workers=0)
    assert catalog.class_names == ("akita", "poodle")
    assert catalog.options["label_column"] == "breed"
    assert labels(catalog) == {"000": "poodle", "001": "akita", "002": "poodle"}


def test_an_image_whose_field_is_missing_has_no_class_and_is_counted(
    make_tar: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = make_tar(
        *({"breed": "poodle"}, {"age": 3}, {"breed": ["a"]}, None, b"{broken", b"[1]", {"breed": ""})
    )
    argv = ["shard", "pack", str(tar), str(tmp_path / "out"), "--label-column", "breed", "--workers", "0"]
    assert main(argv) == 0
    assert "7 in 1 classes, 6 without a class" in capsys.readouterr().out
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == {"(none)": 6, "poodle": 1}


def test_the_field_counts_and_not_the_cls(make_tar: Callable[..., Path], tmp_path: Path) -> None:
    tar = make_tar({"breed": "poodle"}, {}, **{"000_cls": b"7", "001_cls": b"cat"})
    assert labels(pack(tar, tmp_path / "out", options=NAMED, num_workers=0)) == {
        "000": "poodle",
        "001": None,
    }


def test_numbers_are_classes_of_these_numbers(make_tar: Callable[..., Path], tmp_path: Path) -> None:
    tar = make_tar({"breed": 3}, {"breed": "1"}, {"breed": 0.0}, {"breed": -1}, {"breed": True})
    catalog = pack(tar, tmp_path / "out", options=NAMED, num_workers=0)
    assert catalog.class_names == ("0", "1", "2", "3")
    assert labels(catalog) == {"000": "3", "001": "1", "002": "0", "003": None, "004": None}


@pytest.mark.parametrize("value", [None, True, -1, 1.5, float("nan"), float("inf"), [], {}, "", " "])
def test_what_names_no_class(value: object) -> None:
    assert parse_label(value) == (None, -1)


def test_a_field_that_nothing_has_is_refused_with_those_there_are(
    make_tar: Callable[..., Path], tmp_path: Path, photo_folder: Path
) -> None:
    tar = make_tar({"age": 3, "caption": "a dog"}, {"age": 4, "breed": {"name": "poodle"}})
    with pytest.raises(UserError, match=r"--label-column breed: .* in this field; their fields are age, cap"):
        pack(tar, tmp_path / "out", options=NAMED, num_workers=0)
    with pytest.raises(UserError, match="there is none: give tars that have"):
        pack(photo_folder, tmp_path / "out", options=NAMED, num_workers=0)
    (tmp_path / "truth.txt").write_text("n01440764\n")
    with pytest.raises(UserError, match="--ground-truth and --label-column both tell the classes"):
        pack(tar, tmp_path / "out", options=NAMED, ground_truth=tmp_path / "truth.txt", num_workers=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("huge", [1_000_000, 10**30])
def test_a_number_that_would_make_more_classes_than_memory_holds_is_refused(
    make_tar: Callable[..., Path], tmp_path: Path, huge: int
) -> None:
    tar = make_tar({"breed": huge}, {"breed": 1})
    with pytest.raises(UserError, match=r"in\.tar has 1,?0.* classes; at most 1,000,000 are taken"):
        pack(tar, tmp_path / "out", options=NAMED, num_workers=0)


def test_too_many_names_are_refused_while_they_are_listed(
    make_tar: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "MAX_CLASSES", 2)
    monkeypatch.setattr(scan, "BATCH_ROWS", 3)
    tar = make_tar(*({"breed": name} for name in "abcd"))
    with pytest.raises(UserError, match="has 3 classes; at most 2 are taken"):
        pack(tar, tmp_path / "out", options=NAMED, num_workers=0)

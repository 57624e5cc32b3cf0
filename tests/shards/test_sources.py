"""What a folder and a tar list: keys, labels, and what is no image."""

import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from linerate.shards import sources, tar_source
from linerate.shards.errors import UserError
from linerate.shards.sources import FolderSource, Source, SourceReject, SourceRow, judge_name, open_source
from linerate.shards.tar_source import TarSource


def make_files(root: Path, names: Sequence[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def labels(source: Source) -> dict[str, str | int | None]:
    return {
        row.key: row.label if row.label >= 0 else row.label_name
        for row in source.rows()
        if isinstance(row, SourceRow)
    }


def rejects(source: Source) -> dict[str, str]:
    return {row.key: row.reason for row in source.rows() if isinstance(row, SourceReject)}


def test_class_folders_are_labels_and_loose_files_have_none(tmp_path: Path) -> None:
    source = FolderSource(make_files(tmp_path, ["cat/1.jpg", "cat/deep/2.jpg", "dog/1.jpg", "loose.jpg"]))
    assert labels(source) == {
        "cat/1.jpg": "cat",
        "cat/deep/2.jpg": "cat",
        "dog/1.jpg": "dog",
        "loose.jpg": None,
    }


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    assert labels(FolderSource(make_files(tmp_path, ["1.jpg", "no_suffix"]))) == {
        "1.jpg": None,
        "no_suffix": None,
    }


def test_a_folder_around_the_class_folders_is_stepped_through(tmp_path: Path) -> None:
    source = FolderSource(make_files(tmp_path, ["train/cat/1.jpg", "train/dog/1.jpg"]))
    assert labels(source) == {"train/cat/1.jpg": "cat", "train/dog/1.jpg": "dog"}
    one = FolderSource(make_files(tmp_path / "other", ["cat/1.jpg"]))
    assert labels(one) == {"cat/1.jpg": "cat"}


def test_a_link_that_leads_back_up_for_ever_ends(tmp_path: Path) -> None:
    (tmp_path / "up").symlink_to(tmp_path)
    assert labels(FolderSource(tmp_path)) == {}
    assert rejects(FolderSource(tmp_path)) == {"up": "not a regular file"}


def test_what_is_no_image_is_listed_and_never_opened(tmp_path: Path) -> None:
    make_files(tmp_path, ["a.jpg", ".hidden.jpg", "notes.txt", ".git/b.jpg"])
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    source = FolderSource(tmp_path)
    assert labels(source) == {"a.jpg": None}
    assert rejects(source) == {
        ".git": "hidden",
        ".hidden.jpg": "hidden",
        "dangling.jpg": "unreadable",
        "loop": "not a regular file",
        "notes.txt": "not an image",
        "pipe.jpg": "not a regular file",
    }


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    make_files(tmp_path / "store", ["1.jpg"])
    (tmp_path / "in" / "cat").mkdir(parents=True)
    (tmp_path / "in" / "cat" / "l.jpg").symlink_to(tmp_path / "store" / "1.jpg")
    (tmp_path / "in" / "dog").symlink_to(tmp_path / "store")
    assert labels(FolderSource(tmp_path / "in")) == {"cat/l.jpg": "cat", "dog/1.jpg": "dog"}


def test_names_that_are_no_utf8_have_a_readable_key(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).write_bytes(b"x")
    (row,) = FolderSource(tmp_path).rows()
    assert isinstance(row, SourceRow)
    assert (row.key, row.path) == ("\\xff.jpg", b"\xff.jpg")


def test_a_folder_that_may_not_be_read_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_files(tmp_path, ["a.jpg", "shut/b.jpg"])
    look_into = sources._look_into

    def refuse(folder: bytes) -> Any:
        if folder.rstrip(b"/").endswith(b"shut"):
            raise PermissionError(13, "Permission denied")
        return look_into(folder)

    monkeypatch.setattr(sources, "_look_into", refuse)
    assert rejects(FolderSource(tmp_path)) == {"shut": "unreadable"}


def test_huge_files_are_refused_by_their_size() -> None:
    reject = judge_name("a.jpg", sources.MAX_SAMPLE_BYTES + 1)
    assert reject
    assert reject.reason == "too many bytes"
    assert judge_name("a.jpg", sources.MAX_SAMPLE_BYTES) is None


def test_the_special_kinds_of_files_are_named() -> None:
    assert [sources._kind(mode << 12) for mode in (1, 2, 6, 12)] == [
        "pipe",
        "device",
        "special file",
        "socket",
    ]


def test_a_tar_of_class_folders_is_labelled_as_the_folder_would_be(tmp_path: Path) -> None:
    names = ["train/cat/0000.jpg", "train/dog/0000.jpg"]
    tar = make_tar(tmp_path / "x.tar", dict.fromkeys(names, b"x"))
    assert labels(TarSource([tar])) == labels(FolderSource(make_files(tmp_path / "f", names)))
    one = make_tar(tmp_path / "one.tar", {"cat/1.jpg": b"x"})
    assert labels(TarSource([one])) == {"cat/1.jpg": "cat"}
    flat = make_tar(tmp_path / "flat.tar", {"1.jpg": b"x", "2.jpg": b"x"})
    assert labels(TarSource([flat])) == {"1.jpg": None, "2.jpg": None}


def test_rows_of_a_tar_point_at_the_bytes(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "x.tar", {"a/1.jpg": b"first", "b/1.jpg": b"second one"})
    stored = tar.read_bytes()
    assert [
        stored[row.offset : row.offset + row.size]
        for row in TarSource([tar]).rows()
        if isinstance(row, SourceRow)
    ] == [b"first", b"second one"]


def test_webdataset_members_are_one_sample(tmp_path: Path) -> None:
    members = {
        "a/000.cls": b"7",
        "a/000.jpg": b"x",
        "a/000.json": b'{"t": 1}',
        "a/001.jpeg": b"y",
        "a/001.cls": b"tabby cat\n",
        "a/002.txt": b"alone",
        "a/003.jpg": b"z",
    }
    rows = list(TarSource([make_tar(tmp_path / "x.tar", members)]).rows())
    assert [
        (row.key, row.label, row.label_name, row.extra_json) for row in rows if isinstance(row, SourceRow)
    ] == [
        ("a/000.jpg", 7, None, b'{"t": 1}'),
        ("a/001.jpeg", -1, "tabby cat", None),
        ("a/003.jpg", -1, None, None),
    ]
    assert [(row.key, row.reason) for row in rows if isinstance(row, SourceReject)] == [
        ("a/002", "not an image")
    ]


def test_the_last_of_two_members_with_one_name_counts(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for data in (b"old", b"newer"):
            info = tarfile.TarInfo("1.jpg")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("l.jpg")
        link.type = tarfile.SYMTYPE
        archive.addfile(link)
        for name in (".hidden.jpg", "notes.txt"):
            archive.addfile(tarfile.TarInfo(name))
    source = TarSource([path])
    assert [row.size for row in source.rows() if isinstance(row, SourceRow)] == [5]
    assert rejects(source) == {
        "1.jpg": "replaced",
        "l.jpg": "not a regular file",
        ".hidden.jpg": "hidden",
        "notes.txt": "not an image",
    }


def test_keys_of_several_tars_name_the_tar(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    a, b = (make_tar(tmp_path / name, {"000.jpg": b"x"}) for name in ("a.tar", "b.tar"))
    again = make_tar(tmp_path / "more" / "a.tar", {"000.jpg": b"x"})
    assert list(labels(TarSource([a, b]))) == ["a.tar/000.jpg", "b.tar/000.jpg"]
    assert list(labels(TarSource([a, again]))) == [f"{a}/000.jpg", f"{again}/000.jpg"]


def rows_of(tar: Path) -> dict[str, tuple[str | int | None, bytes]]:
    """(label, bytes) of every sample of a tar."""
    stored = tar.read_bytes()
    return {
        row.key: (
            row.label if row.label >= 0 else row.label_name,
            stored[row.offset : row.offset + row.size],
        )
        for row in TarSource([tar]).rows()
        if isinstance(row, SourceRow)
    }


def test_a_tar_in_a_tar_is_a_class_folder(tmp_path: Path) -> None:
    cat = make_tar(tmp_path / "cat.tar", {"1.jpg": b"first", "deep/2.jpg": b"second"}).read_bytes()
    dog = make_tar(tmp_path / "dog.tar", {"1.jpg": b"third", "l.txt": b"x"}).read_bytes()
    members = {"train/cat.tar": cat, "train/dog.tar": dog, "train/eel/1.jpg": b"fourth"}
    outer = make_tar(tmp_path / "x.tar", members)
    assert rows_of(outer) == {
        "train/cat/1.jpg": ("cat", b"first"),
        "train/cat/deep/2.jpg": ("cat", b"second"),
        "train/dog/1.jpg": ("dog", b"third"),
        "train/eel/1.jpg": ("eel", b"fourth"),
    }
    assert rejects(TarSource([outer])) == {"train/dog/l.txt": "not an image"}


def test_webdataset_in_a_tar_in_a_tar_has_its_own_labels(tmp_path: Path) -> None:
    inner = make_tar(tmp_path / "a.tar", {"0.jpg": b"x", "0.cls": b"eel", "1.jpg": b"y"}).read_bytes()
    outer = make_tar(tmp_path / "x.tar", {"a.tar": inner})
    assert rows_of(outer) == {"a/0.jpg": ("eel", b"x"), "a/1.jpg": ("a", b"y")}


def test_tars_in_a_tar_that_are_not_read_are_counted(tmp_path: Path) -> None:
    deepest = make_tar(tmp_path / "c.tar", {"1.jpg": b"x"}).read_bytes()
    middle = make_tar(tmp_path / "b.tar", {"c.tar": deepest, "2.jpg": b"y"}).read_bytes()
    members = {"b.tar": middle, "empty.tar": b"", "text.tar": b"hello" * 200, ".h.tar": deepest}
    source = TarSource([make_tar(tmp_path / "x.tar", members)])
    assert [row.key for row in source.rows() if isinstance(row, SourceRow)] == ["b/2.jpg"]
    found = {row.key: row.detail for row in source.rows() if isinstance(row, SourceReject)}
    assert found == {
        "b/c.tar": "a tar in a tar in a tar",
        "empty.tar": "a .tar file that is none",
        "text.tar": "a .tar file that is none",
        ".h.tar": "its name begins with a dot",
    }


def test_a_damaged_tar_in_a_tar_is_named_with_its_place(tmp_path: Path) -> None:
    inner = make_tar(tmp_path / "a.tar", {"1.jpg": b"x" * 900}).read_bytes()[:1024]
    outer = make_tar(tmp_path / "x.tar", {"a.tar": inner, "z.jpg": b"z" * 9000})
    with pytest.raises(UserError, match=r"x\.tar is cut short or damaged at byte 512: b'1\.jpg' should end"):
        list(TarSource([outer]).rows())


def test_the_members_of_a_tar_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_source, "MAX_MEMBERS", 2)
    assert labels(TarSource([make_tar(tmp_path / "a.tar", {"1.jpg": b"", "2.jpg": b""})]))
    tar = make_tar(tmp_path / "x.tar", {"1.jpg": b"", "2.jpg": b"", "3.jpg": b""})
    with pytest.raises(UserError, match=r"x\.tar has more than 2 members, .*; give it as several tars"):
        list(TarSource([tar]).rows())


# --- img2dataset


def extras(tar: Path) -> dict[str, bytes | None]:
    return {row.key: row.extra_json for row in TarSource([tar]).rows() if isinstance(row, SourceRow)}


def test_a_caption_without_a_json_becomes_one(tmp_path: Path) -> None:
    members = {
        "0.jpg": b"x",
        "0.txt": "a c\u00e4t\n".encode(),
        "1.jpg": b"y",
        "1.json": b'{"caption": "told", "url": "u"}',
        "1.txt": b"not this one",
        "2.jpg": b"z",
        "2.json": b'{"url": "u"}',
        "2.txt": b"added",
        "3.jpg": b"z",
    }
    assert extras(make_tar(tmp_path / "x.tar", members)) == {
        "0.jpg": '{"caption":"a c\u00e4t"}'.encode(),
        "1.jpg": b'{"caption": "told", "url": "u"}',
        "2.jpg": b'{"url":"u","caption":"added"}',
        "3.jpg": None,
    }


def test_captions_alone_make_a_tar_webdatasets(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "x.tar", {"a/0.jpg": b"x", "a/0.txt": b"a cat"})
    assert extras(tar) == {"a/0.jpg": b'{"caption":"a cat"}'}
    other = make_tar(tmp_path / "y.tar", {"a/0.jpg": b"x", "a/readme.txt": b"hello"})
    assert extras(other) == {"a/0.jpg": None}


@pytest.mark.parametrize("stored", [b"[1]", b"{", b'{"a": "\\ud800"}', b'"text"'])
def test_a_json_that_takes_no_caption_stays_and_is_counted(tmp_path: Path, stored: bytes) -> None:
    tar = make_tar(tmp_path / "x.tar", {"0.jpg": b"x", "0.json": stored, "0.txt": b"lost"})
    assert extras(tar) == {"0.jpg": stored}
    assert rejects(TarSource([tar])) == {"0": "caption left out"}


def img2dataset_table(path: Path, rows: list[tuple[str, str, str | None]]) -> None:
    columns = zip(*rows, strict=True)
    names = ("key", "status", "error_message")
    pq.write_table(pa.table({name: list(column) for name, column in zip(names, columns, strict=True)}), path)


def test_what_img2dataset_could_not_fetch_is_counted_once(tmp_path: Path) -> None:
    members = {
        "000.jpg": b"x",
        "000.json": b'{"status": "success"}',
        "001.json": b'{"status": "failed_to_download", "error_message": "HTTP \\ud800 404"}',
        "002.json": b'{"status": "failed_to_resize", "error_message": null}',
        "003.json": b"[]",
    }
    tar = make_tar(tmp_path / "00000.tar", members)
    table = [
        ("000", "success", None),
        ("001", "failed_to_download", "HTTP 404"),
        ("004", "failed_to_download", "timed\nout"),
    ]
    img2dataset_table(tmp_path / "00000.parquet", table)
    (tmp_path / "00000_stats.json").write_text("{}")
    found = [row for row in open_source([tmp_path]).rows() if isinstance(row, SourceReject)]
    assert sorted((row.key, row.reason, row.detail) for row in found) == [
        ("001", "not downloaded", "HTTP \\ud800 404"),
        ("002", "not downloaded", "failed_to_resize"),
        ("003", "not an image", "only json"),
        ("004", "not downloaded", "timed out"),
    ]
    assert labels(TarSource([tar])) == {"000.jpg": None}


def test_other_tables_beside_a_tar_are_left_alone_and_broken_ones_counted(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "x.tar", {"0.jpg": b"x"})
    pq.write_table(pa.table({"key": ["0"]}), tmp_path / "x.parquet")
    assert rejects(TarSource([tar])) == {}
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    assert rejects(TarSource([tar])) == {"x.parquet": "unreadable"}


def test_metadata_of_a_sample_is_bounded(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "x.tar", {"1.jpg": b"x", "1.json": b"0" * (sources.MAX_JSON_BYTES + 1)})
    with pytest.raises(UserError, match=r"1\.json has 1048577 bytes of metadata"):
        list(TarSource([tar]).rows())


def test_open_source_tells_folders_tars_and_folders_of_tars_apart(tmp_path: Path) -> None:
    photos = make_files(tmp_path / "photos", ["1.jpg"])
    (tmp_path / "tars").mkdir()
    tar = make_tar(tmp_path / "tars" / "a.tar", {"1.jpg": b"x"})
    (tmp_path / "tars" / "a.idx").write_bytes(b"v1.2 1")
    assert isinstance(open_source([photos]), FolderSource)
    assert open_source([tar]).containers == [tar]
    assert open_source([tmp_path / "tars"]).containers == [tar]


def test_sources_that_cannot_work_are_refused(tmp_path: Path) -> None:
    photos = make_files(tmp_path / "photos", ["1.jpg"])
    tar = make_tar(tmp_path / "a.tar", {"1.jpg": b"x"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b" + bytes(600))
    for paths, message in (
        ([tmp_path / "missing"], "does not exist"),
        ([tmp_path / "empty"], "is empty"),
        ([photos, tar], "is a folder among 2 sources"),
        ([tmp_path / "a.tar.gz"], "neither a folder nor an uncompressed tar"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(paths)

"""Rejects on the page of thumbnails: drawn where the source is still there, by a process that may die."""

import base64
import io
import json
import re
import resource
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from linerate.__main__ import main
from linerate.shards import reject_images, tolerant
from linerate.shards.catalog import Catalog
from linerate.shards.gallery import GalleryReport, write_gallery
from linerate.shards.inspect_image import RejectedError
from linerate.shards.options import PackOptions
from linerate.shards.pack import pack
from linerate.shards.shard_stats import load_sources
from linerate.shards.sources import FolderSource, SourceReject, SourceRow

MakeJpeg = Callable[..., bytes]
# A module that Python runs whenever it starts: decoders die of an image with such a comment.
PLUGIN = """
import os, signal
from linerate.shards import reject_images, tolerant
real = tolerant.draw
def draw(data, **how):
    if b"poison" in bytes(data):
        os.kill(os.getpid(), signal.SIGSEGV)
    return real(data, **how)
tolerant.draw = draw
"""


def encode(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


@pytest.fixture
def rejects(tmp_path: Path, make_jpeg: MakeJpeg) -> Path:
    """A folder of one sound image and six that are rejected."""
    folder = tmp_path / "in"
    (folder / "a").mkdir(parents=True)
    jpeg = make_jpeg(0, 200, 300)
    comment = b"poison"
    files = {
        "sound.jpg": jpeg,
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "other.jpg": encode(Image.new("RGB", (40, 20), (255, 0, 0)), "PNG"),
        "kills.jpg": jpeg[:2] + b"\xff\xfe\x00\x08" + comment + jpeg[2:-2],
        "text.jpg": b"<html>access denied</html>",
        ".hidden.jpg": jpeg,
        "notes.txt": b"hello",
    }
    for name, data in files.items():
        (folder / "a" / name).write_bytes(data)
    return folder


def write(catalog: Catalog, *, source: tuple[Path, ...] = ()) -> tuple[GalleryReport, str]:
    path = catalog.root.parent / "page.html"
    report = write_gallery(catalog, path, source=source)
    return report, path.read_text(encoding="utf-8").partition('<section id="rejected">')[2]


def drawn(page: str) -> dict[str, Image.Image]:
    """The pictures of a part of a page by their keys."""
    found = re.findall(r'<figure [^>]*title="([^"\n]*)[^>]*>.*?base64,([^"]*)"', page)
    return {key: Image.open(io.BytesIO(base64.b64decode(data))) for key, data in found}


def test_rejects_are_drawn_and_what_kills_the_decoder_costs_only_its_picture(
    rejects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path / "site")
    catalog = pack(rejects, tmp_path / "out", num_workers=0)
    report, page = write(catalog)
    pictures = drawn(page)
    assert pictures.keys() == {"a/cut.jpg", "a/other.jpg"}
    assert report.num_rejects_drawn == 2
    assert pictures["a/other.jpg"].getpixel((80, 40)) == (254, 0, 0)
    assert pictures["a/cut.jpg"].size == (160, 107)
    assert "a/kills.jpg: no end-of-image marker (kills the decoder: SIGSEGV)" in page
    assert "a/text.jpg (not drawn: cannot identify it)" in page
    # By their names they were never looked into, and are not now.
    assert "a/.hidden.jpg: its name begins with a dot</li>" in page
    assert "a/notes.txt</li>" in page
    assert re.findall(r"<summary>(.*?) <small>(\d+)", page)[0] == ("cut short", "2")


def test_a_source_that_is_gone_costs_the_pictures_and_can_be_named(
    rejects: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    catalog = pack(rejects, out, num_workers=0)
    moved = rejects.rename(tmp_path / "moved")
    report, page = write(catalog)
    assert report.num_rejects_drawn == 0
    assert f"no pictures from {rejects}, which is not here; give its place by --source" in page
    argv = ["shard", "preview", str(out), "--html", str(tmp_path / "page.html"), "--source", str(moved)]
    assert main(argv) == 0
    assert "1 images in 1 of 1 groups, 3 rejects" in capsys.readouterr().out
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["html"]["num_rejects_drawn"] == 3
    assert main([*argv[:-1], str(rejects)]) == 2
    assert f"the source {rejects} does not exist" in capsys.readouterr().err
    assert main([*argv[:3], "--out", str(tmp_path / "sheet.png"), *argv[-2:]]) == 2
    assert "--source is where the rejects of a page lie; give --html" in capsys.readouterr().err
    (out / "pack_stats.parquet").unlink()
    assert "no pictures: nothing says where the source was; give it by --source" in write(catalog)[1]


def test_a_recorded_source_that_is_no_longer_one_costs_the_pictures(rejects: Path, tmp_path: Path) -> None:
    catalog = pack(rejects, tmp_path / "out", num_workers=0)
    shutil.rmtree(rejects)
    rejects.mkdir()
    report, page = write(catalog)
    assert (report.num, report.num_rejects_drawn) == (1, 0)
    assert f"no pictures: the source {rejects} is empty" in page


def test_rejects_of_tars_and_manifests_are_found_where_they_lie(
    rejects: Path, tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        archive.add(rejects, arcname="x")
    (tmp_path / "m.csv").write_text(
        "id,path\n1,in/a/sound.jpg\n2,in/a/other.jpg\n3,in/a/cut.jpg\n4,in/a/absent.jpg\n5,http://[::1]/x.jpg\n"
    )
    options = PackOptions(key_column="id")
    catalog = pack(tmp_path / "m.csv", tmp_path / "out", options=options, num_workers=0)
    pack(tmp_path / "in.tar", tmp_path / "out", num_workers=0, append=True)
    manifest, tar = [str(tmp_path / "m.csv")], [str(tmp_path / "in.tar")]
    assert load_sources(tmp_path / "out") == [manifest, tar]
    pictures = drawn(page := write(Catalog.load(catalog.root))[1])
    assert pictures.keys() == {"2", "3", "x/a/cut.jpg", "x/a/other.jpg", "x/a/kills.jpg"}
    assert "4: No such file or directory (unreadable: No such file or directory)" in page
    assert "(it lies at a URL, which is not fetched for a page)" in page


def test_a_key_that_names_another_file_is_not_drawn(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    (tmp_path / "a.jpg").write_bytes(make_jpeg(0))
    (tmp_path / "m.csv").write_text("path\na.jpg\na.jpg\n")
    report, page = write(pack(tmp_path / "m.csv", tmp_path / "out", num_workers=0))
    assert "duplicate key" in page
    assert report.num_rejects_drawn == 0


def test_whatever_decodes_becomes_a_small_jpeg_on_white() -> None:
    clear = encode(Image.new("RGBA", (400, 100), (0, 0, 0, 0)), "PNG")
    deep = encode(Image.fromarray(np.arange(0, 6000, 100, dtype=np.uint16).reshape(6, 10)), "PNG")
    for data, facts, size, first in (
        (clear, "PNG, 400 x 100", (160, 40), 255),
        (deep, "PNG, 10 x 6", (160, 96), 0),
        (encode(Image.new("CMYK", (20, 20)), "TIFF"), "TIFF, 20 x 20", (160, 160), 255),
    ):
        found = tolerant.draw(data, side=160, quality=80)
        image = Image.open(io.BytesIO(found.jpeg)).convert("L")
        assert (found.facts, image.size) == (facts, size)
        level = image.getpixel((0, 0))
        assert isinstance(level, int)
        assert abs(level - first) <= 2


def test_what_pillow_gives_up_on_another_decoder_may_draw(
    make_jpeg: MakeJpeg, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **how: object) -> None:
        raise TypeError("broken EXIF")

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", refuse)
        jpeg, facts = tolerant.draw(make_jpeg(0, 200, 300), side=160, quality=80)
        with pytest.raises(RejectedError, match="not drawn: broken EXIF"):
            tolerant.draw(b"GIF89a", side=160, quality=80)
        patch.setattr(tolerant, "_MAX_PIXELS", 100)
        with pytest.raises(RejectedError, match="not drawn: broken EXIF"):
            tolerant.draw(make_jpeg(0, 200, 300), side=160, quality=80)
    assert facts == "JPEG, 300 x 200"
    assert Image.open(io.BytesIO(jpeg)).size == (160, 107)


def test_bombs_and_formats_that_run_programs_are_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Image.new("L", (20, 20))
    with pytest.raises(RejectedError, match="not drawn: cannot identify it"):
        tolerant.draw(encode(small, "EPS"), side=160, quality=80)
    monkeypatch.setattr(tolerant, "_MAX_PIXELS", 399)
    with pytest.raises(RejectedError, match="not drawn: PNG, 20 x 20 is more than is decoded for a page"):
        tolerant.draw(encode(small, "PNG"), side=160, quality=80)


@pytest.mark.parametrize(("hard", "soft"), [(resource.RLIM_INFINITY, 5000), (3000, 3000), (9000, 5000)])
def test_the_process_that_draws_may_take_so_much_and_no_more_than_it_may_already(
    monkeypatch: pytest.MonkeyPatch, hard: int, soft: int
) -> None:
    limits: dict[int, tuple[int, int]] = {}
    monkeypatch.setattr(resource, "getrlimit", lambda what: (hard, hard))
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    assert tolerant._taken_bytes() > 1 << 20
    monkeypatch.setattr(tolerant, "_taken_bytes", lambda: 1000)
    monkeypatch.setattr(tolerant, "_MAX_BYTES", 4000)
    tolerant._make_artist(160, 80)
    assert limits == {resource.RLIMIT_AS: (soft, hard), resource.RLIMIT_CORE: (0, hard)}
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_memory_that_is_not_told_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **how: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert tolerant._taken_bytes() == 0


def test_a_long_source_is_listed_only_until_all_is_found(rejects: Path) -> None:
    listed: list[str] = []

    class Source(FolderSource):
        def rows(self) -> Iterator[SourceRow | SourceReject]:
            for row in super().rows():
                listed.append(row.key)
                yield row

    with ExitStack() as stack:
        rows, _ = reject_images._find_rows(Source(rejects), {"a/cut.jpg"}, stack)
    assert rows.column("key").to_pylist() == ["a/cut.jpg"]
    assert listed == ["a/.hidden.jpg", "a/cut.jpg"]


def test_every_nasty_file_of_the_real_ones_is_drawn_or_says_why(data_folder: Path, tmp_path: Path) -> None:
    catalog = pack(data_folder / "nasty", tmp_path / "out", options=PackOptions(check="decode"))
    report = write_gallery(catalog, tmp_path / "page.html", per_group=200)
    page = (tmp_path / "page.html").read_text(encoding="utf-8").partition('<section id="rejected">')[2]
    assert report.num_rejects_drawn > catalog.num_rejected / 2
    assert len(drawn(page)) + page.count("<li data-text") == catalog.num_rejected
    assert not ImageFile.LOAD_TRUNCATED_IMAGES

"""`linerate shard preview --html`: what stands on the page, and that no name can become markup."""

import base64
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from linerate.__main__ import main
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.gallery import GalleryReport, write_gallery
from linerate.shards.gallery_page import Cell, RejectGroup, rejects_section, section
from linerate.shards.overview import summarize
from linerate.shards.pack import pack
from linerate.shards.terminal import visible

Capture = pytest.CaptureFixture[str]
HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\u202e\x1b</div>"


class Page(HTMLParser):
    """What a browser sees: every tag with its attributes, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.source = source
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def keys(self) -> list[str]:
        """Of the thumbnails, in order."""
        return [attrs["title"].split("\n")[0] for attrs in self.all("figure")]


@pytest.fixture
def tagged(packed: Catalog, tmp_path: Path) -> Catalog:
    """The packed folder with hashtags: all have #all, each fourth #some, one #one."""
    root = shutil.copytree(packed.root, tmp_path / "tagged")
    for shard in range(packed.num_shards):
        path = root / Path(packed.files[shard]).with_suffix(".parquet")
        table = pq.read_table(path)
        tags = [
            ["#All"] + ["some"] * (i % 4 == 0) + ["one"] * (i == 7)
            for i in table.column("sample_id").to_pylist()
        ]
        pq.write_table(table.append_column("hashtags", pa.array(tags)), path)
    return Catalog.load(root)


def write(catalog: Catalog, path: Path, **how: Any) -> tuple[GalleryReport, Page]:
    report = write_gallery(catalog, path / "page.html", **how)
    assert report.num_bytes == Path(report.out).stat().st_size
    return report, Page((path / "page.html").read_text(encoding="utf-8"))


def test_every_class_shows_so_many_of_its_samples(packed: Catalog, tmp_path: Path) -> None:
    report, page = write(packed, tmp_path, by="class", per_group=3)
    assert report.groups == {"ant": 10, "bee": 10, "cat": 10, "dog": 10}
    assert (report.num, report.num_groups, report.num_broken) == (12, 4, 0)
    assert [key.split("/")[0] for key in page.keys] == ["ant"] * 3 + ["bee"] * 3 + ["cat"] * 3 + ["dog"] * 3
    assert len(set(page.keys)) == 12
    assert [attrs["href"] for attrs in page.all("a")] == ["#g0", "#g1", "#g2", "#g3"]
    for attrs in page.all("img"):
        with Image.open(io.BytesIO(base64.b64decode(attrs["src"].partition("base64,")[2]))) as image:
            assert max(image.size) <= 160
            assert image.format == "JPEG"


def test_groups_follow_hashtags_shards_and_sizes(tagged: Catalog, tmp_path: Path) -> None:
    report, page = write(tagged, tmp_path, by="hashtag", per_group=4)
    assert report.groups == {"all": 40, "some": 10, "one": 1}
    assert (report.num, len(page.keys)) == (9, 9)
    assert write(tagged, tmp_path, by="shard")[0].groups == {f"shard-00000{i}.tar": 8 for i in range(5)}
    sizes = summarize(tagged).size_histogram
    assert list(write(tagged, tmp_path, by="size")[0].groups.values()) == [n for _, n in sizes if n]


def test_of_more_groups_the_most_frequent_are_shown(tagged: Catalog, tmp_path: Path) -> None:
    report, page = write(tagged, tmp_path, by="hashtag", num_groups=2, per_group=1)
    assert list(report.groups) == ["all", "some"]
    assert report.num_groups == 3
    assert any("2 of 3 hashtags" in text for text in page.text)


def test_the_same_seed_draws_the_same_samples_and_another_does_not(packed: Catalog, tmp_path: Path) -> None:
    pages = [write(packed, tmp_path, seed=seed, per_group=5)[1] for seed in (1, 1, 2)]
    assert pages[0].source == pages[1].source
    assert set(pages[0].keys) != set(pages[2].keys)


@pytest.fixture
def plain(tagged: Catalog, tmp_path: Path) -> Catalog:
    """The tagged folder with one reject."""
    return rename_all(Catalog.load(shutil.copytree(tagged.root, tmp_path / "plain")), "x")


@pytest.fixture
def hostile(tagged: Catalog) -> Catalog:
    """Names of everything that carries one are markup."""
    return rename_all(tagged, HOSTILE)


def rename_all(tagged: Catalog, text: str) -> Catalog:
    for shard in range(tagged.num_shards):
        path = tagged.shard_path(shard).with_suffix(".parquet")
        table = pq.read_table(path)
        for name, values in (("key", [text] * len(table)), ("hashtags", [["<b>x</b>"]] * len(table))):
            place = table.schema.get_field_index(name)
            table = table.set_column(place, table.schema.field(name), pa.array(values))
        pq.write_table(table, path)
    header = json.loads((tagged.root / "catalog.json").read_text())
    header["class_names"] = [f"{text}{i}" for i in range(4)]
    header["name"] = text
    (tagged.root / "catalog.json").write_text(json.dumps(header))
    rejected = pq.read_schema(tagged.root / "rejected.parquet")
    row = {"sample_id": None, "key": text, "size": 1, "reason": "not a JPEG", "detail": text}
    pq.write_table(pa.Table.from_pylist([row], schema=rejected), tagged.root / "rejected.parquet")
    return Catalog.load(tagged.root)


@pytest.mark.parametrize("by", ["class", "hashtag"])
def test_no_name_becomes_markup(plain: Catalog, hostile: Catalog, tmp_path: Path, by: Any) -> None:
    report, page = write(hostile, tmp_path, by=by)
    assert report.num
    assert {name for name, _ in page.tags} == {name for name, _ in write(plain, tmp_path, by=by)[1].tags}
    assert len(page.all("script")) == 1
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert all(attrs["src"].startswith("data:image/jpeg;base64,") for attrs in page.all("img"))
    assert not {"\u202e", "\x1b"} & set(page.source)
    shown = HOSTILE.replace("\u202e", r"\u202e").replace("\x1b", r"\x1b")
    assert set(page.keys) == {shown}


def test_the_page_loads_nothing_and_only_its_own_script_may_run(packed: Catalog, tmp_path: Path) -> None:
    _, page = write(packed, tmp_path)
    assert not re.search(r"(?:src|href)=\"(?!data:image/jpeg|#)|url\(|@import|https?:", page.source)
    policy = next(attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs)
    script = page.source.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_rejects_stand_with_their_reason_and_a_few_names(
    tmp_path: Path, make_jpeg: Callable[..., bytes]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(make_jpeg(0))
    for i in range(5):
        (tmp_path / "in" / f"b{i}.jpg").write_bytes(b"GIF89a")
    catalog = pack(tmp_path / "in", tmp_path / "out", num_workers=0)
    text = " ".join(write(catalog, tmp_path, per_group=2)[1].text)
    assert "not a JPEG (GIF)" in text
    assert "b0.jpg" in text
    assert "b2.jpg" not in text
    assert "and 3 more" in text


def test_what_does_not_decode_is_on_the_page_with_the_reason(tagged: Catalog, tmp_path: Path) -> None:
    offset = int(tagged.shard_index(0).offset[0])
    with tagged.shard_path(0).open("r+b") as tar:
        tar.seek(offset)
        tar.write(bytes(16))
    report, page = write(tagged, tmp_path)
    assert report.num_broken == 1
    assert "cannot identify it" in "".join(page.text)
    assert (len(page.all("figure")), len(page.all("img"))) == (40, 39)


@given(st.text(), st.text(), st.text())
def test_any_text_comes_back_from_the_page_as_it_can_be_seen(key: str, group: str, reason: str) -> None:
    cell = Cell(key=key, class_name=group, facts=reason, more="", image="", trouble=None, note=reason)
    rejects = RejectGroup(reason=reason, count=3, shown=[cell], listed=[key])
    page = Page(section(0, group, 1, [cell]) + rejects_section([rejects], note=reason))
    figure = ["figure", "div", "img", "figcaption", "div", "bdi", "div", *["div"] * bool(reason)]
    assert [name for name, _ in page.tags] == [
        *["section", "h2", "small", "div", *figure, "section", "h2", "small", *["p"] * bool(reason)],
        *["details", "summary", "small", "div", *figure, "ul", "li", "li"],
    ]
    assert page.all("figure")[0]["title"].startswith(visible(key))
    assert visible(group) in "".join(page.text)
    assert visible(reason) in "".join(page.text)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"per_group": 0}, "--per is 0, at least 1 is needed"),
        ({"num_groups": 0}, "--groups is 0, at least 1 is needed"),
        ({"per_group": 500, "num_groups": 50}, "make a page of 25,000 images; browsers bear 20,000"),
        ({"by": "hashtag"}, "--by hashtag: these shards have no column `hashtags`"),
    ],
)
def test_a_page_that_cannot_be_is_refused_and_nothing_written(
    packed: Catalog, tmp_path: Path, how: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        write_gallery(packed, tmp_path / "page.html", **how)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_tar_leaves_no_half_page(tagged: Catalog, tmp_path: Path) -> None:
    tagged.shard_path(1).unlink()
    (tmp_path / "new").mkdir()
    with pytest.raises(FileNotFoundError):
        write_gallery(tagged, tmp_path / "new" / "page.html")
    assert list((tmp_path / "new").iterdir()) == []


def test_preview_writes_a_page_beside_or_instead_of_a_sheet(
    packed: Catalog, tmp_path: Path, capsys: Capture
) -> None:
    page = tmp_path / "new" / "page.html"
    assert main(["shard", "preview", str(packed.root), "--html", str(page), "--per", "2"]) == 0
    assert f"{page}: 8 images in 4 of 4 groups" in capsys.readouterr().out
    sheet = tmp_path / "sheet.png"
    argv = ["--html", str(page), "--out", str(sheet), "--num", "3", "--by", "shard", "--json"]
    assert main(["shard", "preview", str(packed.root), *argv]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num"], result["out"], result["html"]["num"]) == (3, str(sheet), 40)
    assert main(["shard", "preview", str(packed.root)]) == 2
    assert "nothing to write: give --out sheet.png, --html page.html" in capsys.readouterr().err

"""verify, inspect and preview of shards in a bucket: what they say of the same shards in a folder."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from linerate.shards.bucket import Bucket
from linerate.shards.catalog import Catalog
from linerate.shards.cli import main
from linerate.shards.errors import UserError
from linerate.shards.look_there import look_at

URL = "s3://shards/in1k"


@pytest.fixture
def there(store: Any, packed: Catalog) -> Any:
    """The store with the shards of `packed` under URL."""
    for path in packed.root.iterdir():
        store.pipe_file(f"shards/in1k/{path.name}", path.read_bytes())
    return store


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    code = main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_verify_reads_each_shard_once_and_keeps_none(
    there: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    workers: str,
) -> None:
    brought: list[str] = []
    most = [0]
    get = Bucket.get

    def count(self: Bucket, name: str, path: Path) -> None:
        get(self, name, path)
        brought.append(name)
        most[0] = max(most[0], len(list(path.parent.glob("*.tar"))))

    monkeypatch.setattr(Bucket, "get", count)
    words = ["verify", URL, "--workers", workers, "--staging", str(tmp_path / "staging")]
    code, report = said(capsys, *words, "--decode", "full")
    assert (code, report["ok"], report["num_samples"], report["num_shards"]) == (0, True, 40, 5)
    assert not list((tmp_path / "staging").iterdir())
    if workers == "0":
        assert sorted(brought) == sorted(
            ["catalog.json", "shards.parquet", "rejected.parquet", "pack_stats.parquet"]
            + [f"shard-{i:06d}{suffix}" for i in range(5) for suffix in (".tar", ".idx", ".parquet")]
        )
        assert most == [1]


def test_verify_finds_there_what_it_finds_here(
    there: Any, packed: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = bytearray((packed.root / packed.files[0]).read_bytes())
    tar[700] ^= 1
    there.pipe_file("shards/in1k/shard-000000.tar", bytes(tar))
    there.rm_file("shards/in1k/shard-000001.tar")
    there.pipe_file("shards/in1k/shard-000002.tar", b"short")
    there.rm_file("shards/in1k/shard-000003.idx")
    there.pipe_file("shards/in1k/shard-000003.parquet", b"no parquet")
    there.pipe_file("shards/in1k/more-000000.tar", b"x")
    there.get("shards/in1k/", str(tmp_path / "copy"), recursive=True)
    code, report = said(capsys, "verify", URL, "--workers", "0")
    code_here, report_here = said(capsys, "verify", str(tmp_path / "copy"), "--workers", "0")
    assert code == code_here == 1
    here = json.loads(json.dumps(report_here["problems"]).replace(str(tmp_path / "copy"), URL))
    # Of a long message the end is cut off, which depends on the path's length.
    assert [(p["file"], p["what"][:80]) for p in report["problems"]] == [
        (p["file"], p["what"][:80]) for p in here
    ]
    assert len({problem["file"] for problem in here}) == 5
    code, report = said(capsys, "verify", URL, "--workers", "0", "--sample", "0.2", "--seed", "1")
    assert code == 1
    assert [p["what"] for p in report["problems"] if p["file"].endswith("1.tar")] == ["the tar is missing"]


def test_inspect_says_the_same_and_fetches_no_tar(
    there: Any, packed: Catalog, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in packed.files:
        there.rm_file(f"shards/in1k/{name}")
    _, report = said(capsys, "inspect", URL)
    _, report_here = said(capsys, "inspect", str(packed.root))
    assert report == report_here | {"root": URL}
    query = "SELECT class_name, count(*) AS n FROM samples GROUP BY ALL ORDER BY 1"
    assert said(capsys, "inspect", URL, "--sql", query) == said(
        capsys, "inspect", str(packed.root), "--sql", query
    )
    there.rm_file("shards/in1k/shard-000002.parquet")
    with pytest.raises(UserError, match="an index of s3://shards/in1k cannot be read"):
        main(["inspect", URL])


def test_previews_are_the_same_and_take_a_few_bytes_of_each_tar(
    there: Any, packed: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for where, name in ((URL, "there"), (str(packed.root), "here")):
        page, sheet = tmp_path / f"{name}.html", tmp_path / f"{name}.png"
        assert main(["preview", where, "--html", str(page), "--out", str(sheet), "--num", "6"]) == 0
    capsys.readouterr()
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()
    there_page = (tmp_path / "there.html").read_text()
    assert there_page.count("<img") == (tmp_path / "here.html").read_text().count("<img") == 40
    with look_at(URL) as look:
        index = look.catalog.shard_index(0)
        with look.catalog.open_tar(0) as tar:
            tar.seek(int(index.offset[0]))
            assert tar.read(2) == b"\xff\xd8"
        assert not list(look.catalog.root.glob("*.tar"))


def test_what_cannot_be_looked_at_is_told_in_a_line(there: Any, packed: Catalog, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no catalog\.json in s3://shards/none"):
        main(["inspect", "s3://shards/none"])
    with pytest.raises(UserError, match=r"--repair mends shards in a folder, .*; copy them to a disk"):
        main(["verify", URL, "--repair"])
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"file cannot be written .*; give another by --staging"):
        main(["verify", URL, "--staging", str(tmp_path / "file")])
    with pytest.raises(UserError, match=r"shards at http://a\.org/x are not looked at there; give a folder"):
        main(["inspect", "http://a.org/x"])
    table = pq.read_table(packed.root / "shards.parquet")
    files = pa.array(["../../evil.tar", *packed.files[1:]])
    pq.write_table(table.set_column(0, "file", files), tmp_path / "x")
    there.put_file(str(tmp_path / "x"), "shards/in1k/shards.parquet")
    with pytest.raises(UserError, match="which is no name of a shard"):
        main(["inspect", URL])

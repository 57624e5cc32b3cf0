"""Packing into a bucket of a real S3 server on loopback: the same bytes, whenever it was killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from linerate.shards import bucket as bucket_module
from linerate.shards.bucket import Bucket
from linerate.shards.catalog import Catalog
from linerate.shards.cli import main
from linerate.shards.engines import Engine
from linerate.shards.errors import UserError
from linerate.shards.options import PackOptions
from linerate.shards.pack import pack

s3fs = pytest.importorskip("s3fs")

ReadAll = Callable[[Path], dict[str, bytes]]
OPTIONS = PackOptions(seed=7, min_shards=3)


@pytest.fixture(scope="module")
def packed_files(
    photo_folder: Path, tmp_path_factory: pytest.TempPathFactory, read_all: ReadAll
) -> dict[str, bytes]:
    """What a folder holds after the same packing."""
    return read_all(pack(photo_folder, tmp_path_factory.mktemp("local") / "out", options=OPTIONS).root)


def stored(store: Any) -> dict[str, bytes]:
    """Every object below shards/in1k by name, but not how long packing took."""
    found = [name for name in store.find("shards/in1k") if not name.endswith("/pack_stats.parquet")]
    return {name.removeprefix("shards/in1k/"): store.cat_file(name) for name in found}


def pack_there(photo_folder: Path, tmp_path: Path, **named: Any) -> Catalog:
    named = {"options": OPTIONS, "num_workers": 0, "staging": tmp_path / "staging"} | named
    return pack(photo_folder, "s3://shards/in1k", **named)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bucket_holds_the_bytes_that_a_folder_would(
    store: Any, photo_folder: Path, packed_files: dict[str, bytes], tmp_path: Path, num_workers: int
) -> None:
    catalog = pack_there(photo_folder, tmp_path, num_workers=num_workers)
    assert stored(store) == packed_files
    assert catalog.num_samples == 40


def test_nothing_but_the_catalog_stays_in_staging(store: Any, photo_folder: Path, tmp_path: Path) -> None:
    catalog = pack_there(photo_folder, tmp_path)
    left = sorted(path.name for path in catalog.root.iterdir())
    assert left == ["catalog.json", "pack_stats.parquet", "rejected.parquet", "shards.parquet"]
    assert catalog.root.is_relative_to(tmp_path / "staging")


def test_what_was_downloaded_verifies(store: Any, photo_folder: Path, tmp_path: Path) -> None:
    pack_there(photo_folder, tmp_path)
    store.get("shards/in1k/", str(tmp_path / "copy"), recursive=True)
    assert main(["verify", str(tmp_path / "copy")]) == 0


def test_packing_again_has_nothing_to_do(
    store: Any, photo_folder: Path, packed_files: dict[str, bytes], tmp_path: Path
) -> None:
    pack_there(photo_folder, tmp_path)
    shutil.rmtree(tmp_path / "staging")  # the bucket alone tells what is done
    stages: list[str] = []
    pack_there(photo_folder, tmp_path, on_progress=lambda stage, amount: stages.append(stage))
    assert "pack" not in stages
    assert stored(store) == packed_files


@pytest.mark.parametrize("lost", ["shard-000002.parquet", "shard-000002.tar", "shard-000002.idx", "all"])
def test_only_what_is_missing_is_packed_again(
    store: Any, photo_folder: Path, packed_files: dict[str, bytes], tmp_path: Path, lost: str
) -> None:
    pack_there(photo_folder, tmp_path)
    store.rm_file("shards/in1k/catalog.json")
    if lost != "all":
        store.rm_file(f"shards/in1k/{lost}")
    done: list[float] = []

    def count(stage: str, amount: float) -> None:
        if stage == "pack":
            done.append(amount)

    pack_there(photo_folder, tmp_path, on_progress=count)
    assert sum(done) == (0 if lost == "all" else 14)
    assert stored(store) == packed_files


def test_a_mark_of_a_shard_that_is_cut_short_counts_for_nothing(
    store: Any, photo_folder: Path, packed_files: dict[str, bytes], tmp_path: Path
) -> None:
    pack_there(photo_folder, tmp_path)
    store.rm_file("shards/in1k/catalog.json")
    store.pipe_file("shards/in1k/shard-000001.tar", b"short")
    store.pipe_file("shards/in1k/shard-000002.parquet", b"no parquet")
    pack_there(photo_folder, tmp_path)
    assert stored(store) == packed_files


@pytest.mark.parametrize("num_put", [3, 6, 12])
def test_killed_between_uploads_it_goes_on_to_the_same_bytes(
    store: Any, photo_folder: Path, packed_files: dict[str, bytes], tmp_path: Path, num_put: int
) -> None:
    script = (
        "import os, signal, sys\n"
        "from linerate.shards.bucket import Bucket\n"
        "from linerate.shards.cli import main\n"
        "put = Bucket.put\n"
        "count = 0\n"
        "def put_and_die(self, path, name):\n"
        "    global count\n"
        "    put(self, path, name)\n"
        "    count += 1\n"
        f"    if count == {num_put}:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "Bucket.put = put_and_die\n"
        "main(sys.argv[1:])\n"
    )
    words = ["pack", str(photo_folder), "s3://shards/in1k", "--seed", "7", "--min-shards", "3"]
    words += ["--workers", "0", "--staging", str(tmp_path / "staging")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    died = subprocess.run(
        [sys.executable, "-c", script, *words], env=environment, capture_output=True, timeout=60, check=False
    )
    assert died.returncode == -signal.SIGKILL
    there = stored(store).keys()
    assert ".pack/plan.json" in there
    assert "catalog.json" not in there
    assert main([*words, "--json"]) == 0
    assert stored(store) == packed_files


def test_other_options_than_those_that_lie_there_are_refused(
    store: Any, photo_folder: Path, packed_files: dict[str, bytes], tmp_path: Path
) -> None:
    pack_there(photo_folder, tmp_path)
    with pytest.raises(UserError, match=r"OUT s3://shards/in1k was begun with .*: --seed was 7, now 8"):
        pack_there(photo_folder, tmp_path, options=PackOptions(seed=8, min_shards=3))
    assert stored(store) == packed_files


def test_another_source_is_refused_also_when_only_a_mark_is_left(
    store: Any, photo_folder: Path, tmp_path: Path
) -> None:
    pack_there(photo_folder, tmp_path)
    store.rm_file("shards/in1k/catalog.json")
    before = stored(store)
    with pytest.raises(UserError, match="the source is not the one"):
        pack_there(photo_folder / "ant", tmp_path)
    assert stored(store) == before


def test_a_prefix_that_holds_something_else_is_refused(
    store: Any, photo_folder: Path, tmp_path: Path
) -> None:
    store.pipe_file("shards/in1k/thesis.pdf", b"x")
    with pytest.raises(UserError, match=r"OUT s3://shards/in1k holds something else \(thesis.pdf\)"):
        pack_there(photo_folder, tmp_path)
    assert stored(store) == {"thesis.pdf": b"x"}


def test_when_nothing_is_kept_nothing_stays_there(store: Any, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 1 files is an image"):
        pack_there(tmp_path / "in", tmp_path)
    assert stored(store) == {}


def test_two_runs_at_once_are_refused(store: Any, photo_folder: Path, tmp_path: Path) -> None:
    def second(stage: str, amount: float) -> None:
        if stage == "plan":
            with pytest.raises(UserError, match="another `linerate shard pack`"):
                pack_there(photo_folder, tmp_path)
            asked.append(stage)

    asked: list[str] = []
    pack_there(photo_folder, tmp_path, on_progress=second)
    assert asked


def test_a_large_file_is_sent_in_parts_and_seen_whole_or_not_at_all(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_module, "PART_BYTES", 5 << 20)
    data = os.urandom(11 << 20)
    (tmp_path / "x").write_bytes(data)
    Bucket("s3://shards/in1k").put(tmp_path / "x", "x")
    assert stored(store) == {"x": data}
    assert "-" in store.info("shards/in1k/x")["ETag"]  # as S3 marks what came in parts


def test_an_upload_that_fails_is_tried_again(
    store: Any, photo_folder: Path, packed_files: dict[str, bytes], tmp_path: Path, monkeypatch: Any
) -> None:
    put_file = s3fs.S3FileSystem.put_file
    failed: list[str] = []

    def fail_once(self: Any, path: str, there: str, **parts: int) -> None:
        if there not in failed:
            failed.append(there)
            raise ConnectionResetError("reset")
        put_file(self, path, there, **parts)

    monkeypatch.setattr(s3fs.S3FileSystem, "put_file", fail_once)
    pack_there(photo_folder, tmp_path)
    assert stored(store) == packed_files


def test_an_upload_that_keeps_failing_ends_with_what_is_whole(
    store: Any, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_file = s3fs.S3FileSystem.put_file

    def fail(self: Any, path: str, there: str, **parts: int) -> None:
        if there.endswith("2.tar"):
            raise ConnectionResetError("reset by peer")
        put_file(self, path, there, **parts)

    monkeypatch.setattr(s3fs.S3FileSystem, "put_file", fail)
    with pytest.raises(UserError, match=r"shard 2: OSError: .*reset by peer.*other 2 are whole"):
        pack_there(photo_folder, tmp_path)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://no-such-bucket/x", "s3://no-such-bucket/x: .*bucket.*make the bucket first"),
        ("ftp://a.org/x", "OUT ftp://a.org/x is none that can be written to"),
        ("s3://", "OUT s3:// is none that can be written to"),
    ],
)
def test_where_nothing_can_be_written_it_says_so(
    store: Any, photo_folder: Path, tmp_path: Path, url: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        pack(photo_folder, url, staging=tmp_path / "staging", num_workers=0)


def test_without_credentials_it_says_so(
    store: Any, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(UserError, match="set the credentials of the store"):
            pack_there(photo_folder, tmp_path)


def test_staging_that_cannot_be_written_is_refused(store: Any, photo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot be written .*--staging"):
        pack_there(photo_folder, tmp_path, staging=tmp_path / "file")


def test_a_beton_is_not_made_of_shards_in_a_bucket(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="aws s3 cp --recursive s3://shards/in1k FOLDER"):
        main(["beton", "s3://shards/in1k", str(tmp_path / "x.beton")])


def test_the_command_tells_what_lies_there(
    store: Any, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pack", str(photo_folder), "s3://shards/in1k", "--staging", str(tmp_path), "--workers", "0"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["root"], told["num_samples"], told["packed_now"]) == ("s3://shards/in1k", 40, 40)
    assert main(words) == 0
    assert "nothing was left to do" in capsys.readouterr().out


def test_ray_needs_a_staging_folder_that_all_nodes_share(photo_folder: Path) -> None:
    with pytest.raises(UserError, match="--engine ray with OUT s3://shards/in1k needs --staging"):
        pack(photo_folder, "s3://shards/in1k", engine=Engine(kind="ray"))


def test_a_missing_bucket_of_google_is_told_by_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(path: str, detail: bool) -> None:
        raise FileNotFoundError("b/absent/o")

    bucket = Bucket("s3://absent/x")
    monkeypatch.setattr(bucket._store, "find", find)
    with pytest.raises(UserError, match="s3://absent/x: b/absent/o; make the bucket first"):
        bucket.sizes()

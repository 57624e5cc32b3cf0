"""Peers of another environment: found, named where missing, and held against ours by what they really do.

Stand-ins of theirs take their places here; what .venv-peers has is tried where it was built.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from linerate.bench import peers
from linerate.bench.contest import Contest, Disagreement, Setting, run_contest
from linerate.bench.images import ImageFolder, copy_folder, load_images
from linerate.bench.peers import APART, missing_peer, open_peer
from linerate.bench.suites import pack_pixels, step, train_lightly
from linerate.bench.suites.read import bench_read
from linerate.bench.suites.shards import against_stream_writers
from linerate.bench.timing import Side
from linerate.shards.pack import pack
from linerate.train.recipes import find_recipe

FAKES = Path(__file__).with_name("fake_peers")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setenv("LINERATE_BENCH_CACHE", os.fspath(tmp_path / "cache"))
    return Setting(size="tiny", scratch=tmp_path, rounds=7)


@pytest.fixture
def images(setting: Setting) -> ImageFolder:
    return copy_folder(load_images(None, num_images=6, num_bytes=5000), setting.scratch / "images")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINERATE_BENCH_PEERS", sys.executable)
    monkeypatch.setenv("PYTHONPATH", os.fspath(FAKES))
    peers._installed.cache_clear()
    yield
    peers._installed.cache_clear()


def settled(contest: Contest) -> str | None:
    """What was found equal, after the peer did its work once; raises Disagreement."""
    assert contest.missing is None
    found = contest.agree()
    for side in (contest.theirs, contest.ours):
        if side.prepare is not None:
            side.prepare()
        side.run()
    return found


def test_every_peer_that_is_missing_is_named_with_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.delenv("LINERATE_BENCH_PEERS", raising=False)
    monkeypatch.setattr(peers, "BUILT_PYTHON", tmp_path / "none")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert missing_peer("streaming") == "mosaicml-streaming is not installed; bring it with: make bench-peers"
    for module in APART:
        assert missing_peer(module) == f"{APART[module]} is not installed; bring it with: make bench-peers"
    assert missing_peer("ffcv") == "ffcv is not installed; bring it with: make ffcv"
    assert missing_peer("webdataset") == "webdataset is not installed; bring it with: pip install webdataset"


def test_the_built_environment_is_found_without_a_variable_and_the_variable_goes_before_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fakes: None
):
    built = tmp_path / "python"
    built.symlink_to(sys.executable)
    monkeypatch.setattr(peers, "BUILT_PYTHON", built)
    assert peers.find_python("litdata") == sys.executable
    monkeypatch.delenv("LINERATE_BENCH_PEERS")
    assert peers.find_python("litdata") == os.fspath(built)
    assert missing_peer("litdata") is None
    monkeypatch.setenv("LINERATE_BENCH_PEERS", os.fspath(tmp_path / "gone"))
    assert peers.find_python("litdata") is None
    assert f"not installed for {tmp_path / 'gone'}, which LINERATE_BENCH_PEERS names" in missing_peer(
        "litdata"
    )


def test_readers_of_other_formats_give_the_samples_that_ours_gives(setting: Setting, fakes: None):
    contests = bench_read(setting)
    next(contests)
    found = {contest.peer.split()[0]: settled(contest) for contest in contests}
    assert found == dict.fromkeys(("mosaicml-streaming", "litdata"), "bytes and label of every sample")


def test_writers_of_other_formats_hold_the_samples_that_ours_holds(
    setting: Setting, images: ImageFolder, fakes: None
):
    found = [settled(contest) for contest in against_stream_writers(setting, images)]
    assert found == ["bytes and label of every sample"] * 2


@pytest.mark.parametrize(
    ("flaw", "message"),
    [("loses", "has 1 that the peer"), ("mixes", "ours lacks 1"), ("sorted", "it is not shuffled")],
)
def test_a_reader_that_gives_something_else_is_refused(
    flaw: str, message: str, setting: Setting, fakes: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FAKE_PEERS_FLAW", flaw)
    contests = bench_read(setting)
    next(contests)
    record = run_contest("read", next(contests), setting=setting, suite="tiny")
    contests.close()
    assert message in record.refused
    assert record.ours is None


def test_img2dataset_packs_what_ours_packs(setting: Setting, images: ImageFolder, fakes: None):
    contests = pack_pixels._against_img2dataset(setting, images, pack_pixels.CHECKED, work="w", bar=1.4)
    (found,) = [settled(contest) for contest in contests]
    assert found == "the size of every image; its pixels to inf dB, the worst one to inf"


def test_lightly_learns_as_ours_from_the_same_start_and_one_that_does_not_is_refused(
    fakes: None, monkeypatch: pytest.MonkeyPatch
):
    shape = {"encoder": "tiny-resnet-w4", "num_keys": 64, "size": 32, "batch": 8}
    side = Side(run=lambda: None)
    for contest in step.against_lightly(side, shape, work="w", autocast=False):
        assert settled(contest).startswith("the losses of 5 steps in float64, to ")
        monkeypatch.setattr(step, "EMA_MOMENTUM", 0.5)
        with pytest.raises(Disagreement, match="losses of 5 steps"):
            contest.agree()


@pytest.fixture
def small_run(
    setting: Setting, images: ImageFolder, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Iterator[Contest]]:
    config = find_recipe("demo").build()
    config = dataclasses.replace(
        config,
        views=dataclasses.replace(config.views, size=16, backend="torch"),
        model=dataclasses.replace(config.model, encoder="tiny-resnet-w4"),
        dictionary=dataclasses.replace(config.dictionary, num_keys=64),
        optim=dataclasses.replace(config.optim, global_batch=4),
        bn=dataclasses.replace(config.bn, bn_group=2, shuffle_block=4),
    )
    monkeypatch.setattr(train_lightly, "usable_cores", lambda: 0)
    catalog = pack(images.root, setting.scratch / "shards", num_workers=0)
    return lambda: train_lightly.against_lightlys_run(config, catalog, images, setting=setting, budget_s=0.0)


def test_lightlys_run_learns_from_the_folder_that_our_shards_were_packed_from(
    small_run: Callable[[], Iterator[Contest]], fakes: None
):
    for contest in small_run():
        assert settled(contest).endswith("; the shapes of the views")
        assert contest.theirs.run.args[0] * 4 == contest.amount, "as many batches as ours"


def test_lightlys_views_of_another_size_are_refused(
    small_run: Callable[[], Iterator[Contest]], monkeypatch: pytest.MonkeyPatch
):
    @contextlib.contextmanager
    def other_size(module: str) -> Iterator[peers.Ask]:
        yield lambda task, **what: [[4, 3, 8, 8]] * 2

    monkeypatch.setattr(train_lightly, "missing_peer", lambda module: None)
    monkeypatch.setattr(train_lightly, "open_peer", other_size)
    for contest in small_run():
        with pytest.raises(Disagreement, match=r"views are \[\[4, 3, 8, 8\]"):
            contest.agree()


@pytest.mark.parametrize(
    ("python", "message"),
    [
        (shutil.which("true"), "litdata ended and said: nothing"),
        (shutil.which("false"), "litdata ended and said: nothing"),
        (sys.executable, "litdata could not do read_epoch: "),
    ],
)
def test_a_peer_that_fails_or_ends_is_a_disagreement_that_says_why(
    python: str, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(peers, "find_python", lambda module: python)
    with open_peer("litdata") as ask, pytest.raises(Disagreement, match=message):
        ask("read_epoch", reader="litdata", folder="nowhere", batch=1)


def test_a_peer_stays_in_one_process_and_what_it_prints_is_not_taken_for_an_answer(
    fakes: None, tmp_path: Path, images: ImageFolder
):
    told = {"files": [os.fspath(path) for path in images.files], "labels": list(images.labels)}
    with open_peer("streaming") as ask:
        ask("write_streaming", **told, out=os.fspath(tmp_path / "a"))
        epochs = [
            ask("digest_epoch", reader="streaming", folder=os.fspath(tmp_path / "a"), batch=2)
            for _ in range(2)
        ]
    assert epochs[0] != epochs[1], "the second is the next epoch of the same dataset"
    assert sorted(epochs[0]) == sorted(epochs[1])


def test_the_list_names_the_missing_and_what_brings_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from linerate.bench import cli

    monkeypatch.setenv("LINERATE_BENCH_PEERS", "/none/python")
    assert cli.main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["benchmarks"]["read"]["missing"] == ["streaming", "litdata"]
    assert listed["missing"].keys() == {"streaming", "litdata", "img2dataset", "lightly"}
    assert cli.main(["list"]) == 0
    assert "run: make bench-peers" in " ".join(capsys.readouterr().out.split())


def test_the_peers_pins_are_ours_where_both_sides_compute_with_them():
    ours, theirs = (
        dict(line.split(" ;")[0].split("==") for line in (ROOT / name).read_text().splitlines())
        for name in ("requirements.txt", "bench/peers.txt")
    )
    for name in ("torch", "torchvision", "timm", "pillow"):
        assert theirs[name] == ours[name]
    assert theirs.keys() >= set(APART.values())


def test_what_lightlys_worker_takes_of_ours_runs_without_what_its_environment_lacks():
    pinned = {line.split("==")[0] for line in (ROOT / "bench" / "peers.txt").read_text().splitlines()}
    ours = {re.split(r"[^\w-]", line)[0].lower() for line in importlib.metadata.requires("linerate") or ()}
    lacking = [
        name
        for name, owners in importlib.metadata.packages_distributions().items()
        if not pinned & (distributions := {one.lower().replace("_", "-") for one in owners})
        and ours & distributions
    ]
    assert {"tyro", "accelerate", "simplejpeg"} <= {*lacking}
    imported = (
        f"import sys; sys.modules.update(dict.fromkeys({lacking}));"
        "from linerate.bench.suites import step_start, train_peers;"
        "encoder, _ = step_start.start('tiny-resnet-w4', num_keys=64);"
        "print(len(list(encoder.parameters())))"
    )
    done = subprocess.run([sys.executable, "-c", imported], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


built = pytest.mark.skipif(
    not peers.BUILT_PYTHON.exists(),
    reason="make bench-peers was not run: that the real peers work as their stand-ins stays untested",
)


@built
@pytest.mark.parametrize("module", ["streaming", "litdata"])
def test_a_real_format_is_read_back_as_it_was_written(module: str, tmp_path: Path, images: ImageFolder):
    where = {"reader": module, "folder": os.fspath(tmp_path / "out"), "batch": 2}
    told = {"files": [os.fspath(path) for path in images.files], "labels": list(images.labels)}
    with open_peer(module) as ask:
        ask(f"write_{module}", **told, out=where["folder"])
        epochs = [ask("digest_epoch", **where) for _ in range(3)]
        assert ask("read_epoch", **where) == len(images.files)
    assert len({json.dumps(epoch) for epoch in epochs}) > 1, "shuffled"
    assert {label for _, label in epochs[0]} == set(images.labels)

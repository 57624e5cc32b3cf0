import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.train.small import SMALL

from linerate.pipeline.bad_samples import BadSample
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.train.config_json import load_config
from linerate.train.run_folder import Damage, RunFolder


def _events(*steps: int) -> list[dict[str, object]]:
    return [{"event": "step", "step": step, "loss": step / 3} for step in steps]


def test_the_log_is_cut_back_to_the_steps_that_are_done(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start(SMALL, done_steps=0)
    for event in _events(1, 2, 3):
        folder.append(event)
    with folder.log.open("a") as file:
        file.write('{"event": "st')  # a kill within a write
    folder.start(SMALL, done_steps=2)
    folder.append(_events(3)[0])
    assert [json.loads(line) for line in folder.log.read_text().splitlines()] == _events(1, 2, 3)
    assert folder.load_log("step") == _events(1, 2, 3)
    assert folder.load_log("knn") == []
    assert load_config(folder.config) == SMALL


def test_a_new_or_empty_folder_is_free(shards: Catalog, tmp_path: Path) -> None:
    RunFolder(tmp_path).require_unused()
    RunFolder(tmp_path / "new").require_unused()
    assert RunFolder(tmp_path / "new").resume(SMALL, shards) == (None, [])
    assert not (tmp_path / "new").exists()


@pytest.fixture
def unwritable() -> Iterator[Path]:
    """A folder that this process may only read, but for `mine`; root becomes somebody else meanwhile."""
    folder = Path(tempfile.mkdtemp())
    (folder / "mine" / "checkpoints").mkdir(parents=True)
    (folder / "mine" / "checkpoints").chmod(0o555)
    (folder / "mine").chmod(0o777)
    folder.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    yield folder
    if is_root:
        os.seteuid(0)
    for path in (folder, folder / "mine", folder / "mine" / "checkpoints"):
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("run", "at_fault"), [("", ""), ("new/run", ""), ("mine", "mine/checkpoints"), ("mine/new", None)]
)
def test_a_folder_that_cannot_be_written_is_refused_in_one_line(
    run: str, at_fault: str | None, unwritable: Path
) -> None:
    root = unwritable / run
    if at_fault is None:
        RunFolder(root).require_writable()
        return
    line = f"--run {root} cannot be written: {unwritable / at_fault}: Permission denied; name a folder"
    with pytest.raises(UserError, match=re.escape(line)):
        RunFolder(root).require_writable()


def test_looking_whether_a_folder_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    RunFolder(tmp_path / "new" / "run").require_writable()
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "missing")
    with pytest.raises(UserError, match=r"log\.jsonl cannot be written \(No such file.*--resume continues"):
        folder.append({"event": "step"})


def test_a_run_that_began_is_not_started_over(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start(SMALL, done_steps=0)
    with pytest.raises(UserError, match="--resume continues it"):
        folder.require_unused()


def test_a_folder_of_something_else_is_left_alone(shards: Catalog, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds something that is no run"):
        RunFolder(tmp_path).resume(SMALL, shards)


def test_damage_is_told_by_shard_and_reason_over_all_ranks_and_restarts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert (folder.damage(), folder.bad_sample_logs()) == ([], [])
    one = {"key": None, "epoch": 0, "step": 1}
    torn = {"shard": "x.tar", "reason": "/a/x.tar: torn", **one}
    takes = [folder.bad_sample_log(rank=rank) for rank in (0, 1)]
    # Rank 1 is restarted elsewhere and finds sample 7 again.
    for rank, sample_id in ((0, 3), (1, 7), (1, 7)):
        takes[rank](BadSample(sample_id=sample_id, **torn))
    takes[0](BadSample(sample_id=None, shard="w.tar", reason="gone", **one))
    with (tmp_path / "bad_samples-rank00000.jsonl").open("a") as file:
        file.write('{"rank": 0, "sam')
    assert folder.damage() == [
        Damage(shard="w.tar", reason="gone", num_samples=None),
        Damage(shard="x.tar", reason="torn", num_samples=2),
    ]
    assert [path.name for path in folder.bad_sample_logs()] == [
        "bad_samples-rank00000.jsonl",
        "bad_samples-rank00001.jsonl",
    ]

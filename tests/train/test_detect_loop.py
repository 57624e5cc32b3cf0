import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.detect_data import write_run, write_voc
from tests.train.detect_toy import Points, toy_job, toy_options
from tests.train.rank_server import RankServer

from linerate.shards.errors import UserError
from linerate.train.evaluate.detect.batches import BatchOrder, Item, judged_items, train_batches
from linerate.train.evaluate.detect.loop import open_ranks, run_job
from linerate.train.evaluate.detect.schedules import StepSchedule, scale_schedule
from linerate.train.evaluate.detect.transfer_folder import (
    TransferFolder,
    append_log,
    cut_log,
    load_state,
    save_state,
)


def _run(source: Points, folder: Path, **more: Any) -> dict[str, float]:
    return run_job(toy_job(source), toy_options(**more), folder=folder, accelerator=open_ranks())


def _log(folder: Path, event: str = "train") -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def test_a_killed_run_goes_on_to_the_very_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    numbers = _run(Points(), tmp_path / "whole")
    dying = Points()
    dying.die_at = 4 * 7 + 2  # in iteration 7; the last checkpoint is of 6
    with pytest.raises(KeyboardInterrupt):
        _run(dying, tmp_path / "broken")
    with (tmp_path / "broken/log.jsonl").open("a") as file:
        file.write('{"event": "train", "iteration": 7}\n{"event": "tra')
    resumed = Points()
    assert _run(resumed, tmp_path / "broken") == numbers
    assert resumed.loaded == 4 * 6 + 4 * 3 + 24  # six iterations, three for BN, the judged ones
    whole, broken = (load_state(tmp_path / name) for name in ("whole", "broken"))
    assert whole is not None
    assert broken is not None
    for name, tensor in whole["network"].items():
        assert torch.equal(tensor, broken["network"][name]), name
    for line, other in zip(_log(tmp_path / "whole"), _log(tmp_path / "broken"), strict=True):
        assert {k: v for k, v in line.items() if k != "images_per_s"} == {
            k: v for k, v in other.items() if k != "images_per_s"
        }


def test_the_loss_falls_and_the_log_says_by_which_rate(tmp_path: Path) -> None:
    _run(Points(), tmp_path)
    lines = _log(tmp_path)
    # Every second iteration, and those of the checkpoints.
    assert [line["iteration"] for line in lines] == [2, 3, 4, 6, 8, 9, 10, 12]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["loss_fit"])
    assert [line["lr"] for line in lines[-3:]] == pytest.approx([0.002, 0.002, 0.002])
    assert lines[0]["lr"] == pytest.approx(0.02 * (1e-3 / 2 + 0.5))


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    source = Points()
    numbers = _run(source, tmp_path)
    loaded = source.loaded
    assert _run(source, tmp_path) == numbers
    assert source.loaded == loaded
    assert numbers["of_nothing"] is None
    assert (numbers["images_judged"], numbers["images_undecodable"]) == (24, 0)


def test_an_image_that_cannot_be_decoded_is_replaced_by_the_next_and_told(tmp_path: Path) -> None:
    source = Points()
    source.broken = {3, 4}
    numbers = _run(source, tmp_path, precise_bn=0)
    assert (numbers["images_judged"], numbers["images_undecodable"]) == (22, 2)
    reasons = [line["reason"] for line in _log(tmp_path, "damage")]
    assert set(reasons) == {"image 3 is cut short", "image 4 is cut short"}
    assert len(reasons) == 2 * 2 + 2  # in two epochs of training, and judged once
    order = BatchOrder(24, batch=24, seed=5)
    items = next(train_batches(source, order, start=0, stop=1))
    assert {item.index for item in items if item.damage} == {5}


def test_a_set_in_which_nothing_can_be_decoded_is_told(tmp_path: Path) -> None:
    source = Points()
    source.broken = set(range(24))
    with pytest.raises(UserError, match=r"none of the 24 images can be decoded, .* is cut short"):
        _run(source, tmp_path)


def test_a_loss_that_is_no_number_ends_the_run_before_a_checkpoint_of_it(tmp_path: Path) -> None:
    source = Points()
    source.scale = float("nan")
    with pytest.raises(UserError, match=r"the loss is nan at iteration 2; give a lower --lr than 0\.02"):
        _run(source, tmp_path)
    assert load_state(tmp_path) is None


def test_a_batch_that_does_not_divide_over_the_ranks_is_told(tmp_path: Path) -> None:
    class Three:
        num_processes = 3

    with pytest.raises(UserError, match="--batch 4 does not divide over 3 ranks; give 3"):
        run_job(toy_job(Points()), toy_options(), folder=tmp_path, accelerator=Three())


def test_every_image_is_seen_once_an_epoch_and_ranks_share_a_batch() -> None:
    order = BatchOrder(10, batch=4, seed=1)
    seen = [index for iteration in range(5) for _, index in order.places(iteration)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    source = Points()
    of_rank: list[list[list[Item]]] = [
        list(train_batches(source, BatchOrder(24, batch=4, seed=1), start=2, stop=4, rank=rank, world_size=2))
        for rank in range(2)
    ]
    alone = list(train_batches(source, BatchOrder(24, batch=4, seed=1), start=2, stop=4))
    for first, second, whole in zip(*of_rank, alone, strict=True):
        assert [i.index for i in first + second] == [i.index for i in whole]
        assert all(torch.equal(a.image, b.image) for a, b in zip(first + second, whole, strict=True))


def test_judged_images_come_in_order_as_they_are() -> None:
    items = list(judged_items(Points(), [5, 1]))
    assert [(item.index, float(item.image[0, 0, 0])) for item in items] == [(5, 5.0), (1, 1.0)]


def test_the_papers_schedule_scales_with_the_batch() -> None:
    assert scale_schedule("24k", batch=16) == StepSchedule(
        iterations=24_000, steps=(18_000, 22_000), warmup=100, lr=0.02
    )
    assert scale_schedule("2x", batch=8) == StepSchedule(
        iterations=360_000, steps=(240_000, 320_000), warmup=2000, lr=0.01
    )
    trial = scale_schedule("9k", batch=16, iterations=120, lr=0.5)
    assert trial == StepSchedule(iterations=120, steps=(90, 110), warmup=12, lr=0.5)


def test_the_rate_rises_from_a_thousandth_and_falls_at_the_steps() -> None:
    schedule = StepSchedule(iterations=10, steps=(6, 8), warmup=4, lr=1.0)
    rates = [schedule.lr_at(iteration) for iteration in range(10)]
    assert rates == pytest.approx([0.001, 0.25075, 0.5005, 0.75025, 1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("words", [{"batch": 0}, {"batch": 1, "iterations": 0}, {"batch": 1, "lr": 0.0}])
def test_a_schedule_of_nothing_is_told(words: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="must be"):
        scale_schedule("24k", **words)


def test_a_folder_of_another_transfer_or_of_something_else_is_told(tmp_path: Path) -> None:
    folder = TransferFolder(tmp_path / "out")
    folder.open({"batch": 4, "data": Path("a")})
    folder.open({"batch": 4, "data": Path("a")})
    with pytest.raises(UserError, match=r"holds another transfer: batch 4 \(now 8\)"):
        folder.open({"batch": 8, "data": Path("a")})
    with pytest.raises(UserError, match="holds something that is no transfer"):
        TransferFolder(tmp_path).open({})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="holds something that is no transfer"):
        TransferFolder(tmp_path / "file").open({})


def test_what_cannot_be_written_or_read_is_told_and_the_old_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path, {"iteration": 3})

    def full(*words: Any) -> None:
        raise RuntimeError("[enforce fail] no space\nat ...")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"checkpoint\.pt cannot be written \(\[enforce fail\] no space\)"):
        save_state(tmp_path, {"iteration": 6})
    state = load_state(tmp_path)
    assert state is not None
    assert state["iteration"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    (tmp_path / "file").write_text("")
    for write in (
        lambda: append_log(tmp_path / "file", {}),
        lambda: TransferFolder(tmp_path / "file/x").open({}),
    ):
        with pytest.raises(UserError, match="cannot be written"):
            write()
    (tmp_path / "checkpoint.pt").write_bytes(b"PK cut short")
    with pytest.raises(UserError, match="is cut short or no checkpoint of a transfer"):
        load_state(tmp_path)
    cut_log(tmp_path / "nothing", done=3)


def test_two_ranks_do_what_one_does_and_judge_every_image_once(ranks: RankServer, tmp_path: Path) -> None:
    """Their BN statistics are synchronised: the toy's weights are those of one rank with the whole batch."""
    run_job(toy_job(Points(), noise=0.0), toy_options(), folder=tmp_path / "one", accelerator=open_ranks())
    run = write_run(tmp_path / "run")
    voc = write_voc(tmp_path / "voc", {"trainval": [0, 1, 2], "test": [3, 4, 5]})
    words = (tmp_path / "two", run, voc, tmp_path / "out")
    end = ranks.run("tests.train.detect_ranks_worker", *words, world_size=2, out=tmp_path)
    end.require_success()
    one, two = (load_state(tmp_path / name) for name in ("one", "two"))
    assert one is not None
    assert two is not None
    for name in ("mix.weight", "norm.weight", "norm.bias", "fit.weight", "norm.running_mean"):
        assert torch.allclose(one["network"][name], two["network"][name], rtol=1e-7), name
    for line, other in zip(_log(tmp_path / "one"), _log(tmp_path / "two"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["mean"]["images_judged"] == 3
    assert [text.count("AP50") for text in end.outputs] == [1, 0]

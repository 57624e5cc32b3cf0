import dataclasses
from typing import Any

import pytest
from tests.train.small import SMALL

from linerate.train.cli import parse_train
from linerate.train.config import Dictionary, Optim, Speed, TrainConfig
from linerate.train.config_json import from_plain, to_plain
from linerate.train.display import plain_line, switch_lines
from linerate.train.switches import resolve_switches


def words(config: TrainConfig = SMALL, *, gpu: bool = True, ranks: int = 1, **speed: Any) -> dict[str, str]:
    config = dataclasses.replace(config, speed=Speed(**speed))
    device = "cuda" if gpu else "cpu"
    return resolve_switches(config, world_size=ranks, device_type=device).words()


def test_on_a_cpu_every_switch_of_a_gpu_is_off_and_says_why() -> None:
    told = words(gpu=False, cuda_graphs=True, side_stream=True)
    for name in ("cuda_graphs", "side_stream", "fused_update", "kernels"):
        assert told[name] == "off: no CUDA device"
    assert told["precision"].startswith("fp32: no CUDA device")
    assert told["channels_last"] == "on"
    assert told["compile"].startswith("off: it takes a minute")
    assert told["micro_batch"].startswith("off: ")


def test_on_a_gpu_what_was_asked_for_is_on() -> None:
    told = words(cuda_graphs=True, side_stream=True, compile="step", micro_batch=8, channels_last=False)
    assert {name for name, state in told.items() if state == "on"} >= {"cuda_graphs", "side_stream"}
    assert (told["precision"], told["compile"], told["micro_batch"]) == ("bf16", "step", "8")
    assert told["channels_last"] == "off: --no-channels-last"
    assert told["fused_update"] == "on"


BANK = dataclasses.replace(SMALL, dictionary=Dictionary(dictionary="memory-bank", num_keys=40))
END = dataclasses.replace(SMALL, dictionary=Dictionary(dictionary="end-to-end"))
LARS = dataclasses.replace(SMALL, optim=Optim(optimizer="lars", global_batch=16))


@pytest.mark.parametrize(
    ("config", "ranks", "speed", "name", "why"),
    [
        (SMALL, 1, {}, "cuda_graphs", "not measured yet"),
        (SMALL, 2, {"cuda_graphs": True}, "cuda_graphs", "2 ranks"),
        (SMALL, 1, {"cuda_graphs": True, "precision": "fp16"}, "cuda_graphs", "fp16's scaler"),
        (BANK, 1, {"cuda_graphs": True}, "cuda_graphs", "a memory bank draws"),
        (SMALL, 1, {}, "side_stream", "not measured yet"),
        (END, 1, {"side_stream": True}, "side_stream", "no key encoder of its own"),
        (SMALL, 1, {"fused_update": "off"}, "fused_update", "--fused-update off"),
        (LARS, 1, {}, "fused_update", "lars has no kernel"),
        (END, 1, {}, "fused_update", "no key encoder to move"),
    ],
)
def test_what_cannot_be_had_on_a_gpu_is_off_and_says_why(
    config: TrainConfig, ranks: int, speed: dict[str, Any], name: str, why: str
) -> None:
    state = words(config, ranks=ranks, **speed)[name]
    assert state.startswith("off: ")
    assert why in state


def test_no_line_of_the_display_is_wider_than_80_columns() -> None:
    every = [
        words(config, gpu=gpu, ranks=ranks, cuda_graphs=asked, side_stream=asked)
        for config in (SMALL, BANK, END, LARS)
        for gpu in (False, True)
        for ranks in (1, 128)
        for asked in (False, True)
    ]
    lines = [line for switches in every for line in switch_lines({"event": "start", "switches": switches})]
    assert len(lines) == 32 * 8
    assert max(map(len, lines)) <= 80
    # At the end they are in the log, and what was given up is in the summary.
    assert switch_lines({"event": "end", "switches": every[0]}) == switch_lines({"event": "step"}) == []
    assert "no CUDA" not in plain_line({"event": "note", "step": 0, "text": "x"})


def test_words_from_when_compile_was_yes_or_no_still_hold() -> None:
    for given, what in (
        (["--compile"], "encoders"),
        (["--no-compile"], "off"),
        (["--compile", "step"], "step"),
    ):
        assert parse_train(["cifar10", *given, "--lr", "0.06"])[1].speed.compile == what
    plain = to_plain(SMALL)
    for old, what in ((True, "encoders"), (False, "off")):
        plain["speed"]["compile"] = old
        assert from_plain(plain).speed.compile == what

"""The model of a batch's time holds for pipelines that are simulated, and its verdict says what it found."""

import dataclasses
from typing import Any

import pytest

from linerate.bench.bottleneck import BatchModel, BatchTimes, find_bottleneck
from linerate.bench.way_out import Surroundings, verdict_sentence
from linerate.train.recipes import find_recipe


def simulated(read_s: float, rest_s: float, step_s: float, *, num: int = 200) -> float:
    """Seconds a batch of a reader, a loader and a step that work side by side, each on its own batch."""
    read_end = rest_end = step_end = filled_s = 0.0
    for nth in range(num):
        read_end += read_s
        rest_end = max(rest_end, read_end) + rest_s
        step_end = max(step_end, rest_end) + step_s
        filled_s = step_end if nth == num // 2 - 1 else filled_s
    return (step_end - filled_s) / (num - num // 2)


def times(loader: dict[str, float], step: dict[str, float], *, side_by_side: bool, **more: Any) -> BatchTimes:
    """What one would measure of stages that overlap wholly, or that take turns on one core."""
    read = loader.get("read", 0.0)
    rest, step_s = sum(loader.values()) - read, sum(step.values())
    loader_s = max(read, rest) if side_by_side else read + rest
    measured = {
        "batch": 100,
        "loader_s": loader_s,
        "step_s": step_s,
        "both_s": simulated(read, rest, step_s) if side_by_side else loader_s + step_s,
        "loader_stages": loader,
        "step_stages": step,
        "logging_s": 0.0,
        "reads_ahead": side_by_side,
    }
    return BatchTimes(**{**measured, **more})


LOADER = {"read": 0.3, "decode": 0.5, "augment": 0.2}
STEP = {"query forward": 0.1, "backward": 0.4}


@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize("stage", [*LOADER, *STEP])
def test_a_free_stage_gives_what_a_simulation_without_it_gives(stage: str, side_by_side: bool):
    model = BatchModel(times(LOADER, STEP, side_by_side=side_by_side))
    loader, step = ({k: v * (k != stage) for k, v in side.items()} for side in (LOADER, STEP))
    rest, step_s = loader["decode"] + loader["augment"], sum(step.values())
    truth = simulated(loader["read"], rest, step_s) if side_by_side else sum(loader.values()) + step_s
    assert model.seconds({stage: 0.0}) == pytest.approx(truth, rel=0.02)
    assert model.rates_if_free()[stage] == pytest.approx(100 / truth, rel=0.02)


def test_the_shares_of_a_side_make_one_where_its_stages_run_side_by_side():
    found = times(LOADER, STEP, side_by_side=True, logging_s=0.1, step_s=0.45)
    assert found.loader_s < sum(LOADER.values())
    shares = BatchModel(found).shares()
    expected = {"read": 0.3, "decode": 0.5, "augment": 0.2}
    expected |= {"query forward": 0.1 / 0.6, "backward": 0.4 / 0.6, "logging": 0.1 / 0.6}
    assert shares == pytest.approx(expected)


@pytest.mark.parametrize("both_s", [0.9, 1.0, 1.2, 1.5, 2.0])
def test_with_nothing_free_the_model_gives_the_measured_time(both_s: float):
    model = BatchModel(times(LOADER, STEP, side_by_side=True, both_s=both_s, logging_s=0.01))
    assert model.seconds() == pytest.approx(both_s + 0.01)
    assert model.sides() == pytest.approx((0.7, 0.51))


def test_the_side_that_is_slower_by_a_tenth_bounds_what_overlaps():
    def kind(step_s: float, both_s: float) -> str:
        made = times(LOADER, {"backward": step_s}, side_by_side=True, both_s=both_s)
        return find_bottleneck(BatchModel(made)).kind

    assert kind(0.5, 0.7) == "loader"
    assert kind(1.0, 1.0) == "step"
    assert kind(0.72, 0.72) == "balanced"
    assert kind(0.5, 1.2) == "shared"
    assert kind(0.01, 0.71) == "loader", "what takes turns with next to nothing is bound by itself"


def test_in_a_loader_that_reads_ahead_the_shorter_part_is_never_named():
    made = times({"read": 0.8, "decode": 0.5, "augment": 0.2}, STEP, side_by_side=True)
    assert find_bottleneck(BatchModel(made)).stage == "read"
    made = times({"read": 0.6, "decode": 0.4, "augment": 0.25}, STEP, side_by_side=True)
    assert find_bottleneck(BatchModel(made)).stage == "decode", "0.6 s of reading lie hidden behind 0.65"


def test_a_backend_that_cannot_be_divided_is_one_stage():
    made = times({"loader": 0.7}, STEP, side_by_side=True)
    assert find_bottleneck(BatchModel(made)).stage == "loader"


def sentence(made: BatchTimes, **about: Any) -> str:
    config = find_recipe("in1m-v2").build()
    config = dataclasses.replace(config, speed=dataclasses.replace(config.speed, **about.pop("speed", {})))
    common = {"cores": 8, "loader_threads": 8, "step_threads": 8, "sample_bytes": 110_000.0}
    around = Surroundings(**{"config": config, "on_gpu": True, **common, **about})
    model = BatchModel(made)
    return verdict_sentence(model, find_bottleneck(model), around)


GPU = {"query forward": 0.005, "key forward": 0.004, "backward": 0.01}


def test_a_loader_bound_run_is_told_cores_and_the_jpeg_unit_with_figures():
    made = times({"read": 0.004, "decode": 0.03, "augment": 0.005}, GPU, side_by_side=True)
    told = sentence(made, decode_s_by_load={0.65: 0.03, 0.8: 0.02, 0.9: 0.025})
    assert told == (
        "decode-bound: 2,860 of the step's 5,260 pairs/s; --hw-decoder-load 0.8 would lift it to about 4,000 "
        "or 7 more cores would lift it to about 5,260"
    )


def test_cores_are_told_as_far_as_decoding_was_measured_to_divide():
    made = times({"read": 0.004, "decode": 0.03, "augment": 0.0}, GPU, side_by_side=True)
    # 0.015 s stay whatever the cores; of the other 0.015 s the step's 0.019 leave 0.004: 30 cores for 8.
    assert sentence(made, divided_share=0.5).endswith("22 more cores would lift it to about 5,260")
    assert "core" not in sentence(made, divided_share=0.05)
    assert "--loader-threads 13 would lift it" in sentence(made, cores=16)


@pytest.mark.parametrize(
    ("loader", "step", "more", "told"),
    [
        (
            {"read": 0.05, "decode": 0.01, "augment": 0.01},
            GPU,
            {},
            "read-bound: 2,000 of the step's 5,260 pairs/s; it reads 220 MB/s, and at 440 MB/s it would "
            "be 4,000",
        ),
        (
            {"read": 0.001, "decode": 0.002, "augment": 0.001},
            GPU,
            {},
            "backward-bound: 5,260 of the loader's 33,300 pairs/s; in half the time it would be 7,140: "
            "--compile encoders may do it (`linerate tune` times it)",
        ),
        (
            {"read": 0.001, "decode": 0.002, "augment": 0.001},
            GPU,
            {"logging_s": 0.03},
            "logging-bound: 2,040 of the loader's 33,300 pairs/s; --log-steps 7895 would lift it to about "
            "5,210",
        ),
        (
            {"read": 0.001, "decode": 0.018, "augment": 0.001},
            GPU,
            {},
            "balanced: 5,260 pairs/s with a loader of 5,260 and a step of 5,260, so one stage alone gives "
            "little; decode and backward in half the time would give 7,140",
        ),
    ],
)
def test_every_kind_of_verdict_has_its_sentence(
    loader: dict[str, float], step: dict[str, float], more: dict[str, float], told: str
):
    assert sentence(times(loader, step, side_by_side=True, **more)) == told


def test_on_shared_cores_the_times_add_and_more_cores_shorten_both():
    made = times({"read": 0.1, "decode": 1.0, "augment": 0.3}, {"backward": 1.2}, side_by_side=False)
    assert sentence(made, on_gpu=False, cores=2) == (
        "backward-bound: 38.5 pairs/s, as loader (71.4) and step (83.3) take turns on 2 cores, and without "
        "backward 71.4; 2 more cores would lift it to 76.9 at most"
    )


def test_what_takes_turns_on_a_gpu_is_not_told_to_buy_cores():
    made = times({"read": 0.1, "decode": 1.0, "augment": 0.3}, {"backward": 1.2}, side_by_side=False)
    told = sentence(made)
    assert "take turns on the GPU" in told
    assert "core" not in told
    made = times({"read": 0.1, "decode": 0.1, "to-device": 1.0}, {"backward": 0.9}, side_by_side=False)
    told = sentence(made, on_gpu=False, cores=2)
    assert told.startswith("to-device-bound")
    assert "more core" not in told

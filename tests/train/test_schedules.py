import itertools
import math

import pytest

from linerate.train.config import Schedule
from linerate.train.schedules import ema_momentum_at, lr_at, lr_boundaries, total_steps


def test_step_decays_hold_from_their_milestones_on() -> None:
    schedule = Schedule(decay="step", epochs=6, milestones=(2, 4), factor=0.1)
    rates = [lr_at(schedule, lr=1.0, step=step, steps_per_epoch=10) for step in (0, 19, 20, 39, 40, 59)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_cosine_per_epoch_is_the_references_half_cycle() -> None:
    schedule = Schedule(decay="cosine", epochs=200)
    for step in (0, 5003, 5004, 500_400, 1_000_799):
        epoch = step // 5004
        expected = 0.03 * 0.5 * (1.0 + math.cos(math.pi * epoch / 200))
        assert lr_at(schedule, lr=0.03, step=step, steps_per_epoch=5004) == expected


def test_cosine_per_step_falls_at_every_step_and_starts_at_lr() -> None:
    schedule = Schedule(decay="cosine", epochs=3, cosine_per="step")
    rates = [lr_at(schedule, lr=0.5, step=step, steps_per_epoch=4) for step in range(12)]
    assert rates[0] == 0.5
    assert all(a > b for a, b in itertools.pairwise(rates))


def test_ig1b_decays_nineteen_times_to_a_last_rate_of_0_01621() -> None:
    schedule = Schedule(decay="exponential", epochs=None, iterations=1_250_000, factor=0.9)
    boundaries = lr_boundaries(schedule, lr=0.12, steps_per_epoch=917_968)
    assert len(boundaries) == 1 + 19
    assert boundaries[0] == (0, 0.12)
    assert boundaries[1] == (62_500, pytest.approx(0.108))
    assert boundaries[-1] == (1_187_500, pytest.approx(0.01621, abs=5e-6))
    assert lr_at(schedule, lr=0.12, step=1_249_999, steps_per_epoch=917_968) == boundaries[-1][1]


def test_boundaries_are_exactly_where_the_rate_changes() -> None:
    for schedule in (
        Schedule(decay="step", epochs=5, milestones=(2, 4, 9)),
        Schedule(decay="cosine", epochs=5),
        Schedule(decay="cosine", epochs=None, iterations=32),
        Schedule(decay="exponential", epochs=5, decay_steps=6),
    ):
        total = total_steps(schedule, steps_per_epoch=7)
        rates = [lr_at(schedule, lr=1.0, step=step, steps_per_epoch=7) for step in range(total)]
        changes = [step for step in range(total) if step == 0 or rates[step] != rates[step - 1]]
        assert lr_boundaries(schedule, lr=1.0, steps_per_epoch=7) == [(s, rates[s]) for s in changes]


def test_cosine_per_step_tells_epochs_and_the_last_step() -> None:
    schedule = Schedule(decay="cosine", epochs=2, cosine_per="step")
    assert [step for step, _ in lr_boundaries(schedule, lr=1.0, steps_per_epoch=7)] == [0, 7, 13]


def test_a_length_counts_epochs_or_iterations() -> None:
    assert total_steps(Schedule(epochs=200), steps_per_epoch=5004) == 1_000_800
    assert total_steps(Schedule(epochs=None, iterations=9), steps_per_epoch=5004) == 9


def test_warm_up_rises_from_0_and_the_cosine_begins_after_it_as_in_v3() -> None:
    schedule = Schedule(decay="cosine", epochs=100, cosine_per="step", warmup_epochs=10)
    for step in (0, 1, 35, 69, 70, 71, 400, 699):
        epoch = step / 7
        expected = 2.4 * (
            epoch / 10 if epoch < 10 else 0.5 * (1 + math.cos(math.pi * (epoch - 10) / (100 - 10)))
        )
        assert lr_at(schedule, lr=2.4, step=step, steps_per_epoch=7) == pytest.approx(expected)
    told = lr_boundaries(schedule, lr=2.4, steps_per_epoch=7)
    assert [step for step, _ in told[:12]] == [0, 7, 14, 21, 28, 35, 42, 49, 56, 63, 70, 77]
    assert (told[0][1], told[10][1]) == (0.0, 2.4)


def test_warm_up_comes_before_every_other_decay() -> None:
    for schedule in (
        Schedule(decay="step", epochs=5, milestones=(3,), warmup_epochs=2),
        Schedule(decay="exponential", epochs=5, decay_steps=6, warmup_epochs=2),
        Schedule(decay="cosine", epochs=5, warmup_epochs=2),
    ):
        rates = [lr_at(schedule, lr=1.0, step=step, steps_per_epoch=4) for step in range(20)]
        assert rates[:8] == pytest.approx([step / 8 for step in range(8)])
        later = lr_boundaries(schedule, lr=1.0, steps_per_epoch=4)[2:]
        changes = [step for step in range(8, 20) if step == 8 or rates[step] != rates[step - 1]]
        assert [step for step, _ in later] == changes


def test_the_ema_momentum_rises_to_one_by_a_half_cosine_or_stays() -> None:
    ramp = Schedule(epochs=10, milestones=(), ema_ramp="cosine")
    found = [ema_momentum_at(ramp, ema_momentum=0.99, step=step, steps_per_epoch=4) for step in (0, 20, 39)]
    assert found == pytest.approx([0.99, 0.995, 1 - 0.01 * 0.5 * (1 + math.cos(math.pi * 39 / 40))])
    assert ema_momentum_at(Schedule(), ema_momentum=0.99, step=7, steps_per_epoch=4) == 0.99

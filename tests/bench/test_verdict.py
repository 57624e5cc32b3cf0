import dataclasses
import io

import numpy as np
from rich.console import Console

from linerate.bench.record import Record
from linerate.bench.verdict import compare_records, differences_table


def record(rate: float, *, spread: float = 0.01, lead: float = 2.0, **changes: object) -> Record:
    """A record whose nine rounds lie evenly around `rate`, and whose peer is `lead` times as slow."""
    seconds = (1 / rate) * (1 + spread * np.linspace(-1, 1, 9))
    made = Record(
        name="ema",
        peer="loop",
        work="161 tensors",
        unit="updates/s",
        ours=rate,
        theirs=rate / lead,
        ratio=lead,
        ours_s=tuple(seconds.tolist()),
        theirs_s=tuple((lead * seconds).tolist()),
        machine={"cpu": "one", "cores": 2.0},
    )
    return dataclasses.replace(made, **changes)


def verdict(a: Record, b: Record, **how: object) -> tuple[str, bool]:
    (difference,) = compare_records([a], [b], **{"tolerance": 0.05, **how})
    return difference.verdict, difference.regressed


def test_a_clear_slowdown_past_the_tolerance_is_a_regression():
    assert verdict(record(100), record(80)) == ("slower", True)


def test_a_clear_slowdown_within_the_tolerance_is_none():
    assert verdict(record(100), record(97)) == ("slower", False)


def test_a_speedup_is_faster():
    assert verdict(record(100), record(130)) == ("faster", False)


def test_a_difference_within_the_spread_is_the_same():
    assert verdict(record(100, spread=0.3), record(93, spread=0.3)) == ("same", False)


def test_the_lead_over_the_peer_does_not_move_with_the_machine():
    a, b = record(100), record(50, machine={"cpu": "a slower one", "cores": 2.0})
    assert verdict(a, b) == ("slower", True)
    assert verdict(a, b, of="ratio") == ("same", False)
    assert verdict(a, record(50, lead=1.5), of="ratio") == ("slower", True)


def test_another_or_a_noisy_machine_is_a_caveat():
    other = record(100, machine={"cpu": "two", "cores": 2.0, "noise": {"noisy": True}})
    (difference,) = compare_records([record(100)], [other], tolerance=0.05)
    assert difference.caveat == "B noisy, other machine"


def test_counts_are_compared_exactly():
    a = record(1, kind="count", ours=900.0, ours_s=(), theirs_s=())
    assert verdict(a, dataclasses.replace(a)) == ("same", False)
    assert verdict(a, dataclasses.replace(a, ours=901.0)) == ("slower", False)
    assert verdict(a, dataclasses.replace(a, ours=1000.0)) == ("slower", True)
    assert verdict(a, dataclasses.replace(a, ours=0.0)) == ("faster", False)


def test_a_count_that_rises_from_zero_is_a_regression():
    a = record(1, kind="count", ours=0.0, ours_s=(), theirs_s=())
    assert verdict(a, dataclasses.replace(a, ours=1.0)) == ("slower", True)


def test_what_only_one_file_has_is_listed():
    a, b = record(100), record(100, name="read")
    found = compare_records([a], [b], tolerance=0.05)
    assert [(d.name, d.verdict) for d in found] == [("ema", "only in A"), ("read", "only in B")]


def test_what_was_measured_before_and_is_refused_now_is_a_regression():
    refused = record(100, ours=None, ours_s=(), theirs_s=(), refused="the keys differ")
    assert verdict(record(100), refused) == ("refused in B", True)
    assert verdict(refused, record(100)) == ("not comparable", False)
    (difference,) = compare_records([record(100)], [refused], tolerance=0.05)
    assert difference.caveat == "B refused: the keys differ"


def test_what_has_no_rounds_is_not_comparable_and_says_so():
    projected = record(100, ours_s=(), theirs_s=())
    (difference,) = compare_records([record(100)], [projected], tolerance=0.05)
    assert (difference.verdict, difference.caveat) == ("not comparable", "B has no rounds")


def test_an_accuracy_that_rises_is_better_though_it_is_a_count():
    a = record(1, kind="count", unit="% kNN top-1", ours=25.0, ours_s=(), theirs_s=())
    assert verdict(a, dataclasses.replace(a, ours=30.0)) == ("faster", False)
    assert verdict(a, dataclasses.replace(a, ours=20.0)) == ("slower", True)


def test_other_ranks_are_another_benchmark():
    found = compare_records([record(100, ranks=1)], [record(190, ranks=2)], tolerance=0.05)
    assert [d.verdict for d in found] == ["only in A", "only in B"]


def test_a_core_to_which_a_benchmark_pinned_itself_is_no_other_machine():
    a = record(100, machine={"cpu": "one", "cores": 1.0, "cores_installed": 2})
    b = record(100, machine={"cpu": "one", "cores": 2.0, "cores_installed": 2})
    (difference,) = compare_records([a], [b], tolerance=0.05)
    assert difference.caveat == ""


def test_readings_of_memory_may_wander_by_a_tenth_and_growth_below_its_bar():
    def memory(ours: float, *, unit: str = "MiB", met: bool = True) -> Record:
        return record(1, kind="count", unit=unit, ours=ours, ours_s=(), theirs_s=(), met=met)

    assert verdict(memory(1000), memory(1090)) == ("same", False)
    assert verdict(memory(1000), memory(1200)) == ("slower", True)
    assert verdict(memory(0.5, unit="%"), memory(0.9, unit="%")) == ("same", False)
    assert verdict(memory(0.5, unit="%"), memory(2.5, unit="%", met=False)) == ("slower", True)
    assert verdict(memory(1000, unit="bytes"), memory(1090, unit="bytes")) == ("slower", True)


def test_the_table_shows_interval_exactness_and_reasons_within_80_columns():
    counted = record(1, name="enqueue", kind="count", unit="queue copies", ours=1.0, ours_s=(), theirs_s=())
    pairs = (
        (record(100), record(80, machine={"noise": {"noisy": True}})),
        (counted, dataclasses.replace(counted, ours=0.0)),
        (
            record(9, name="[red]x[/]", peer=None),
            record(9, name="[red]x[/]", peer=None, refused="[b]they differ"),
        ),
    )
    found = compare_records([a for a, _ in pairs], [b for _, b in pairs], tolerance=0.05)
    printed = io.StringIO()
    Console(width=80, file=printed).print(differences_table(found))
    lines = printed.getvalue().splitlines()
    words = " ".join(printed.getvalue().split())
    assert max(map(len, lines)) <= 80
    low, high = found[0].ratio.low, found[0].ratio.high
    assert f"{low:.2f} to {high:.2f}" in words
    assert "exact" in words
    assert "[red]x[/]" in words
    assert "they differ" in words
    assert "past the" in words

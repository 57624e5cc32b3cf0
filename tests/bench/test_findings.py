import math

import pytest
from tests.bench.made_records import made, scaled, versus

from linerate.bench.findings import find, judged, reach, scalings_of, stacks_of, status
from linerate.bench.fleet import machines_of
from linerate.bench.record import Record


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (versus(100.0, 4.0, bar=3.0), "met"),
        (versus(100.0, 2.0, bar=3.0), "not met"),
        (versus(100.0, 2.0, bar=3.0, met=None), "other size"),
        (versus(100.0, 2.0), "no bar"),
        (
            made(100.0, peer="x", missing="x is not installed", bar=2.0, bar_reads="ratio >= 2"),
            "not measured",
        ),
        (made(100.0, missing="x is not installed"), "not measured"),
        (made(None, refused="they differ", bar=2.0, bar_reads="ratio >= 2"), "refused"),
    ],
)
def test_where_a_record_stands(record: Record, expected: str):
    assert status(record) == expected


@pytest.mark.parametrize(
    ("record", "value"),
    [
        (versus(100.0, 2.0, bar=4.0), 0.5),
        (versus(100.0, 2.0), 2.0),
        (made(4700.0, bar=4700.0, bar_reads="ours >= 4700"), 1.0),
        (made(750.0, kind="count", bar=900.0, bar_reads="ours <= 900"), 1.2),
        (made(0.0, kind="count", bar=900.0, bar_reads="ours <= 900"), math.inf),
        (made(0.0, kind="count", bar=0.0, bar_reads="ours <= 0"), 1.0),
        (made(3.0, kind="count", bar=0.0, bar_reads="ours <= 0"), 0.0),
    ],
)
def test_reach_is_1_at_the_bar_and_more_is_better(record: Record, value: float):
    found = reach(record)
    assert found is not None
    assert found.value == pytest.approx(value)


def test_the_interval_of_a_cost_is_turned_round_with_it():
    found = reach(
        made(1000.0, kind="count", ours_p10=800.0, ours_p90=1250.0, bar=1000.0, bar_reads="ours <= 1000")
    )
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(0.8), pytest.approx(1.25))


def test_nothing_measured_reaches_nothing():
    assert reach(made(100.0, missing="x", bar=2.0, bar_reads="ratio >= 2")) is None
    assert reach(made(100.0)) is None


def test_missing_peers_and_refusals_are_judged_and_plain_rates_are_not():
    bound = {"kind": "count", "unit": "collectives", "bar": 4.0, "bar_reads": "ours <= 4", "met": True}
    records = [
        made(1.0, work="a"),
        made(1.0, work="b", missing="x is not installed"),
        made(None, work="c", refused="they differ"),
        made(1.0, work="d", ceiling="copy", ceiling_rate=2.0, ceiling_share=0.5),
        made(4310.0, name="ceilings", work="memory copy", unit="GB/s"),
        scaled("strong", 2, 100.0),
        made(3.0, name="scale", work="f", **bound),
    ]
    (machine,) = machines_of(records)
    assert [record.work for record in judged(machine)] == ["b", "c", "d", "f"]
    assert find(records, {}).tally == {"not measured": 1, "refused": 1, "no bar": 1, "met": 1}


def test_a_curve_is_one_mode_over_ranks_and_its_efficiency_is_the_ratio_of_the_records():
    records = [
        # The median of the rounds' ratios, not the ratio of the medians 180 and 200.
        scaled("strong", 2, 180.0, ratio=0.92),
        scaled("weak", 1, 90.0),
        scaled("strong", 1, 100.0),
        scaled("strong", 8, 600.0, note="projection: by bytes"),
    ]
    strong, weak = scalings_of(machines_of(records)[0])
    assert (strong.title, weak.title) == ("strong: resnet50", "weak: resnet50")
    assert [point.ranks for point in strong.points] == [1, 2, 8]
    assert [point.ideal for point in strong.points] == [100.0, 200.0, 800.0]
    assert [point.efficiency for point in strong.points] == pytest.approx([1.0, 0.92, 0.75])
    assert [point.projected for point in strong.points] == [False, False, True]


def test_ranks_that_were_held_against_nothing_are_no_point_of_a_curve():
    records = [scaled("strong", 1, 100.0), scaled("strong", 2, 180.0, ratio=None, theirs=None)]
    (strong,) = scalings_of(machines_of(records)[0])
    assert [point.ranks for point in strong.points] == [1]


@pytest.mark.parametrize(
    ("measured", "projected", "title"),
    [
        (
            "weak: b8 a rank, resnet50, 224 px, gloo, single-threaded ranks: 2",
            "weak: b8 a rank, resnet50, 224 px, 4 ranks, projected",
            "weak: b8 a rank, resnet50, 224 px",
        ),
        (
            "strong: b16 on all ranks, resnet50, 224 px, NCCL on 2 GPUs",
            "strong: b4 a rank, resnet50, 224 px, 4 ranks, projected",
            "strong: b16 on all ranks, resnet50, 224 px",
        ),
    ],
)
def test_a_projection_goes_on_from_what_was_measured(measured: str, projected: str, title: str):
    records = [
        made(100.0, name="scale", work=measured, ranks=2, ratio=0.8),
        made(150.0, name="scale", work=projected, ranks=4, ratio=0.6, note="projection: by bytes"),
    ]
    (scaling,) = scalings_of(machines_of(records)[0])
    assert scaling.title == title
    assert [point.projected for point in scaling.points] == [False, True]


def test_another_batch_is_another_curve():
    works = ("weak: b8 a rank, resnet50, 224 px, 2 ranks", "weak: b16 a rank, resnet50, 224 px, 2 ranks")
    records = [made(100.0, name="scale", work=work, ranks=2, ratio=0.8) for work in works]
    assert len(scalings_of(machines_of(records)[0])) == 2


def test_a_batch_is_told_from_a_call_of_several():
    record = made(
        100.0, amount=1024.0, name="pipeline", work="loader and step: r50, b256", stages={"read": 1.0}
    )
    (stack,) = stacks_of(machines_of([record])[0])
    assert stack.whole_s == pytest.approx(2.56)


def test_a_stack_is_a_record_with_stages():
    record = made(100.0, name="pipeline", stages={"read": 0.1, "decode": 0.3}, verdict="decode-bound")
    (stack,) = stacks_of(machines_of([record])[0])
    assert stack.stages == {"read": 0.1, "decode": 0.3}
    assert stack.whole_s == pytest.approx(2.56)
    assert stack.verdict == "decode-bound"


def test_the_stages_of_step_stages_are_gathered_into_one_stack():
    works = {"whole step": 100.0, "forward": 400.0, "backward": 200.0}
    records = [made(rate, name="step-stages", work=f"{stage}: eager: r50") for stage, rate in works.items()]
    (stack,) = stacks_of(machines_of(records)[0])
    assert stack.work == "eager: r50"
    assert stack.stages == {"forward": pytest.approx(0.64), "backward": pytest.approx(1.28)}
    assert stack.whole_s == pytest.approx(2.56)

import pytest
from tests.bench.made_records import DESK, made, versus

from linerate.bench.cost import LOADED, UNLOADED, cost_basis, costs_of, paper_runs, prices_of
from linerate.bench.fleet import machines_of
from linerate.shards.errors import UserError

LOADER_AND_STEP = "loader and step: resnet50, two 224 px v2 views by dali, b256"
NODE_NAME, DESK_NAME = "H200, 16 of 192 cores", "AMD Ryzen 9 7950X, 32 cores"


def test_the_papers_runs_are_200_epochs_of_in1m_and_a_million_and_a_quarter_batches_of_1024():
    assert [run.images for run in paper_runs()] == [256_233_400, 1_280_000_000]


def test_a_cost_worked_out_by_hand():
    # 2,000 pairs/s are 7.2 M an hour; at 3 dollars an hour 2.4 M a dollar.
    (cost,) = costs_of(machines_of([made(2000.0)]), {NODE_NAME: 3.0})
    assert cost.images_per_usd == pytest.approx(2_400_000)
    small, large = paper_runs()
    assert cost.hours(small) == pytest.approx(35.588, abs=1e-3)
    assert cost.usd(small) == pytest.approx(106.764, abs=1e-3)
    assert cost.hours(large) == pytest.approx(177.778, abs=1e-3)
    assert cost.usd(large) == pytest.approx(533.333, abs=1e-3)


def test_without_a_price_there_are_hours_and_no_dollars():
    (cost,) = costs_of(machines_of([made(2000.0)]), {})
    assert cost.usd(paper_runs()[0]) is None
    assert cost.images_per_usd is None
    assert cost.hours(paper_runs()[0]) > 0


@pytest.mark.parametrize(
    ("name", "work", "basis"),
    [
        ("step", "compiled: resnet50", UNLOADED),
        ("train", LOADER_AND_STEP, LOADED),
        ("pipeline", LOADER_AND_STEP, LOADED),
        ("pipeline", "step alone on synthetic views: resnet50", UNLOADED),
        ("pipeline", "loader alone: resnet50", None),
        ("step-small", "eager: resnet50", None),
        ("views", "two 224 px views", None),
        ("scale", "strong: resnet50", None),
    ],
)
def test_only_rates_of_training_are_costed(name: str, work: str, basis: str | None):
    assert cost_basis(made(100.0, name=name, work=work)) == basis


def test_counts_refusals_and_projections_cost_nothing():
    assert cost_basis(made(749.0, kind="count")) is None
    assert cost_basis(made(100.0, refused="they differ")) is None
    assert cost_basis(made(100.0, note="projection: if decode were free")) is None


def test_the_rate_to_quote_is_of_the_papers_work_with_its_loader():
    small = made(9000.0, name="train", work="loader and step: tiny-resnet-w16, two 32 px v1 views")
    loaded = made(2900.0, name="pipeline", work=LOADER_AND_STEP)
    costs = costs_of(machines_of([small, made(4700.0), loaded]), {})
    assert [cost.pairs_per_s for cost in costs] == [2900.0, 4700.0, 9000.0]
    assert [cost.chosen for cost in costs] == [True, False, False]
    assert [cost.paper_work for cost in costs] == [True, True, False]


def test_one_work_against_two_peers_is_one_cost():
    costs = costs_of(machines_of([versus(4700.0, 2.0), versus(4710.0, 1.1, peer="lightly")]), {})
    assert [cost.pairs_per_s for cost in costs] == [4710.0]


def prices(*words: str) -> dict[str, float]:
    return prices_of(words, machines_of([made(1.0), made(2.0, machine=DESK)]))


def test_prices_are_for_all_machines_or_for_the_one_that_is_named():
    assert prices("2.5") == {NODE_NAME: 2.5, DESK_NAME: 2.5}
    assert prices("h200=3") == {NODE_NAME: 3.0}
    assert prices("0.5", "H200=3") == {NODE_NAME: 3.0, DESK_NAME: 0.5}
    assert prices(f"{DESK_NAME}=1") == {DESK_NAME: 1.0}


def test_one_card_is_not_its_eight():
    eight = made(1.0, machine={**made(1.0).machine, "gpu": {"name": "NVIDIA H200", "count": 8}})
    assert prices_of(["H200=3"], machines_of([eight, made(1.0)])) == {NODE_NAME: 3.0}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("0", "--price-per-hour 0 is no price"),
        ("-2", "is no price"),
        ("nan", "is no price"),
        ("cheap", "is no price"),
        ("H200=", "is no price"),
        ("B300=2", "no machine of these files has that name; there are H200"),
        ("=2", "no machine of these files"),
        ("cores=2", "fits several machines"),
    ],
)
def test_a_price_that_says_nothing_is_one_clear_line(word: str, message: str):
    with pytest.raises(UserError, match=message):
        prices(word)

import pytest

from linerate.shards.errors import UserError
from linerate.train.plan import plan_run, show_boundaries
from linerate.train.recipes import RECIPES


def test_in1m_has_the_papers_steps() -> None:
    plan = plan_run(RECIPES["in1m-v1"].build(), num_images=1_281_167, world_size=1)
    assert (plan.steps_per_epoch, plan.total_steps, plan.num_dropped) == (5004, 1_000_800, 143)
    assert plan.lr_boundaries == [
        (0, 0.03),
        (120 * 5004, pytest.approx(0.003)),
        (160 * 5004, pytest.approx(0.0003)),
    ]


def test_ig1b_counts_iterations() -> None:
    plan = plan_run(RECIPES["ig1b-v1"].build(), num_images=940_000_000, world_size=64)
    assert (plan.total_steps, plan.total_images, plan.rank_batch) == (1_250_000, 1_280_000_000, 16)
    assert plan.epochs == pytest.approx(1.36, abs=0.005)
    assert plan.lr_last == pytest.approx(0.01621, abs=5e-6)


def test_cifar10_has_19400_steps() -> None:
    plan = plan_run(RECIPES["cifar10"].build(), num_images=50_000, world_size=1)
    assert plan.total_steps == 19_400


def test_too_few_images_for_a_batch_are_refused() -> None:
    with pytest.raises(UserError, match="100 images do not fill one global_batch=256"):
        plan_run(RECIPES["in1m-v1"].build(), num_images=100, world_size=1)


def test_many_boundaries_are_told_by_the_first_and_the_last() -> None:
    text = show_boundaries([(step, 0.1) for step in range(200)])
    assert text.splitlines()[0] == "0: 0.1"
    assert "... 192 more ..." in text
    assert text.splitlines()[-1] == "199: 0.1"

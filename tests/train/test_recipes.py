import dataclasses

import pytest
import torch

from linerate.shards.errors import UserError
from linerate.train.config import Optim, TrainConfig
from linerate.train.recipes import RECIPES, decide_lr, find_recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_its_command_cost_source_and_result(name: str) -> None:
    text = RECIPES[name].build.__doc__ or ""
    assert RECIPES[name].build().recipe == name
    for part in (f"linerate train {name} ", "Command:", "Cost:", "Source:", "Expected:"):
        assert part in text


def test_the_papers_numbers() -> None:
    v1, v2, ig = (RECIPES[name].build() for name in ("in1m-v1", "in1m-v2", "ig1b-v1"))
    assert (v1.optim.global_batch, v1.optim.lr, v1.optim.weight_decay) == (256, 0.03, 1e-4)
    assert (v1.loss.temperature, v1.model.ema_momentum, v1.dictionary.num_keys) == (0.07, 0.999, 65536)
    assert (v1.schedule.epochs, v1.schedule.milestones, v1.views.augmentation) == (200, (120, 160), "v1")
    assert (v2.loss.temperature, v2.model.head, v2.views.augmentation) == (0.2, "mlp", "v2")
    assert (v2.schedule.decay, v2.schedule.cosine_per) == ("cosine", "epoch")
    assert RECIPES["in1m-v2-800ep"].build().schedule.epochs == 800
    assert (ig.optim.global_batch, ig.optim.lr, ig.bn.bn_group) == (1024, 0.12, 16)
    assert (ig.schedule.iterations, ig.schedule.factor, ig.schedule.decay_steps) == (1_250_000, 0.9, 62_500)


def test_cifar10_has_the_numbers_of_the_one_gpu_reference() -> None:
    config = RECIPES["cifar10"].build()
    assert (config.optim.global_batch, config.optim.lr, config.optim.weight_decay) == (512, 0.06, 5e-4)
    assert (config.loss.temperature, config.model.ema_momentum, config.dictionary.num_keys) == (
        0.1,
        0.99,
        4096,
    )
    assert config.optim.global_batch // config.bn.bn_group == 8
    assert config.views.recipe().query.blur_probability == 0


def test_the_symmetric_cifar10_makes_the_steps_of_the_reference_s_sum() -> None:
    """SGD on half the gradient, twice the rate and half the decay is SGD on the whole one."""
    one, other = (RECIPES[name].build() for name in ("cifar10", "cifar10-symmetric"))
    weights = [torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for weight, config, scale in zip(weights, (one, other), (2.0, 1.0), strict=True):
        optim = config.optim
        sgd = torch.optim.SGD(
            [weight], lr=optim.lr, momentum=optim.sgd_momentum, weight_decay=optim.weight_decay
        )
        for step in range(5):
            weight.grad = scale * (weight.detach() + step)
            sgd.step()
    torch.testing.assert_close(*weights)
    assert other.loss.symmetric
    assert (other.dictionary, other.model, other.bn) == (one.dictionary, one.model, one.bn)


def test_the_other_dictionaries_have_the_papers_numbers() -> None:
    queue = RECIPES["in1m-v1"].build()
    batch, bank, noise = (
        RECIPES[f"in1m-v1-{name}"].build() for name in ("end-to-end", "memory-bank", "memory-bank-nce")
    )
    assert (batch.num_negatives, batch.optim.lr) == (1023, 0.12)
    assert batch.optim.global_batch // batch.bn.bn_group == 8
    assert (bank.dictionary.num_keys, bank.dictionary.bank_loss, bank.optim) == (
        65536,
        "infonce",
        queue.optim,
    )
    assert (noise.dictionary.num_keys, noise.dictionary.bank_loss) == (4096, "nce")
    for config in (batch, bank, noise):
        assert (config.schedule, config.views, config.loss) == (queue.schedule, queue.views, queue.loss)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean `cifar10`"):
        find_recipe("cifar")


def _with_batch(config: TrainConfig, batch: int, lr: float | None = None) -> TrainConfig:
    optim = Optim(global_batch=batch, lr=lr or config.optim.lr)
    return dataclasses.replace(config, optim=optim)


def test_another_batch_needs_a_decision_about_lr() -> None:
    recipe = RECIPES["in1m-v1"].build()
    with pytest.raises(UserError, match=r"--scale-lr for 0\.06 \(linear in the batch\), or --lr VALUE"):
        decide_lr(_with_batch(recipe, 512), recipe=recipe, lr_given=False, scale_lr=False)


def test_scale_lr_is_linear_in_the_batch() -> None:
    recipe = RECIPES["in1m-v1"].build()
    scaled = decide_lr(_with_batch(recipe, 1024), recipe=recipe, lr_given=False, scale_lr=True)
    assert scaled.optim.lr == pytest.approx(RECIPES["ig1b-v1"].build().optim.lr)


def test_a_given_lr_is_kept_even_if_it_is_the_recipes() -> None:
    recipe = RECIPES["in1m-v1"].build()
    config = _with_batch(recipe, 512, lr=0.03)
    assert decide_lr(config, recipe=recipe, lr_given=True, scale_lr=False) == config


def test_both_decisions_at_once_are_refused() -> None:
    recipe = RECIPES["in1m-v1"].build()
    with pytest.raises(UserError, match="contradict"):
        decide_lr(recipe, recipe=recipe, lr_given=True, scale_lr=True)

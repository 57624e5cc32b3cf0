import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from linerate.train.infonce import InfoNce, infonce, infonce_pass, infonce_plain


def unit_rows(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=dtype))


def with_gradient(form: object, query: Tensor, *args: Tensor, temperature: float) -> tuple[InfoNce, Tensor]:
    query = query.clone().requires_grad_()
    found = form(query, *args, temperature=temperature)  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(found.loss, query)
    return found, gradient


@pytest.mark.parametrize("num_negatives", [1, 4, 255, 256, 257, 1000, 9000])
@pytest.mark.parametrize("temperature", [0.07, 0.2, 0.001])
def test_streamed_equals_plain(num_negatives: int, temperature: float) -> None:
    query, negatives = unit_rows(7, 16, seed=0), unit_rows(num_negatives, 16, seed=1)
    key = normalize(query + 0.7 * unit_rows(7, 16, seed=2))
    plain, plain_gradient = with_gradient(infonce_plain, query, key, negatives, temperature=temperature)
    found, gradient = with_gradient(infonce, query, key, negatives, temperature=temperature)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, plain_gradient, rtol=1e-4, atol=1e-6 / temperature)


def test_top1_and_top5_count_the_negatives_above_the_positive() -> None:
    # Row i of six queries has exactly i negatives above its own key.
    query = torch.eye(6)
    key = 0.5 * query
    negatives = torch.stack([torch.arange(6) > place for place in range(6)]).float()
    for form in (infonce_plain, infonce):
        found = form(query, key, negatives, temperature=1.0)
        assert found.top1.item() == pytest.approx(1 / 6)
        assert found.top5.item() == pytest.approx(5 / 6)
        assert not found.top1.requires_grad


def test_gradient_in_float64_is_the_derivative_of_the_loss() -> None:
    query, key, negatives = (unit_rows(n, 5, seed=n, dtype=torch.float64) for n in (4, 4, 600))
    query.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q: infonce(q, key[: len(q)], negatives, temperature=0.3).loss, (query,)
    )


def test_loss_is_ln_of_num_keys_plus_one_at_chance() -> None:
    query = torch.ones(3, 1)
    assert infonce(query, query, torch.ones(99, 1), temperature=0.07).loss.item() == pytest.approx(
        math.log(100), abs=1e-5
    )


def test_negatives_may_be_bfloat16() -> None:
    query, negatives = unit_rows(5, 8, seed=0), unit_rows(300, 8, seed=1).bfloat16()
    found = infonce(query, query, negatives, temperature=0.1)
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found, infonce_plain(query, query, negatives.float(), temperature=0.1))


def test_large_logits_neither_overflow_nor_vanish() -> None:
    query = 300.0 * torch.eye(4)
    found, gradient = with_gradient(infonce, query, query, torch.cat([query, -query]), temperature=0.1)
    # The positive and its copy among the negatives share the probability.
    assert found.loss.item() == pytest.approx(math.log(2), abs=1e-5)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_logits_of_any_size_keep_their_loss_and_gradient(scale: float) -> None:
    # All far below zero, all far above it, and both in one batch: the plain exponential leaves float32.
    query, negatives = unit_rows(6, 16, seed=0), unit_rows(700, 16, seed=1)
    direction = torch.ones(16) / 4
    for towards in (-direction, direction):
        rows = normalize(negatives + 4 * towards)
        near = normalize(query + 4 * direction) * scale
        args = (rows[:6], rows[6:])
        wide = [tensor.double() for tensor in (near, *args)]
        plain, plain_gradient = with_gradient(infonce_plain, *wide, temperature=1.0)
        found, gradient = with_gradient(infonce, near, *args, temperature=1.0)
        torch.testing.assert_close(found.loss, plain.loss.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, plain_gradient.float(), rtol=1e-4, atol=1e-5)


def test_no_tensor_as_large_as_a_tenth_of_the_logits() -> None:
    num, num_negatives = 256, 16_384
    query, negatives = unit_rows(num, 8, seed=0), unit_rows(num_negatives, 8, seed=1)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // tensor.element_size())
            return result

    with Sizes():
        infonce_pass(query, query, negatives, 0.1)
    assert largest <= 0.1 * num * (num_negatives + 1)


def test_a_gradient_to_keys_is_refused_not_dropped() -> None:
    query = unit_rows(2, 4, seed=0)
    with pytest.raises(ValueError, match="no gradient to keys"):
        infonce(query, query.clone().requires_grad_(), unit_rows(9, 4, seed=1), temperature=0.1)

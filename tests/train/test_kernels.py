"""The Triton kernels: here by Triton's interpreter (tests/conftest.py chooses it), on a GPU as they are."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from linerate.train.infonce import infonce, infonce_plain
from linerate.train.kernels import Unsuited

pytest.importorskip("triton", reason="all Triton kernels stay untested")

from linerate.train.kernels.infonce import infonce_kernels, tiling
from linerate.train.kernels.sgd_ema import SgdEma

# Triton 3.6's interpreter makes numbers of arrays of one element: NumPy 2.3 warns, 2.4 refuses.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def unit_rows(*shape: int, seed: int) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE)


def require_equal_to_float64(query: Tensor, key: Tensor, negatives: Tensor, *, temperature: float) -> None:
    """Loss, gradient and ranks of the kernels against the plain form in float64."""
    wide = query.double().requires_grad_()
    plain = infonce_plain(wide, key.double(), negatives.double(), temperature=temperature)
    (plain_gradient,) = torch.autograd.grad(plain.loss, wide)
    loss, gradient, top1, top5 = infonce_kernels(query, key, negatives, temperature)
    torch.testing.assert_close(loss.double(), plain.loss.detach(), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), plain_gradient, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(torch.stack((top1, top5)).double(), torch.stack(plain[1:]))


# N, K, C: not one a multiple of a block; a single key; one row; several ranges of keys; the widest rows.
@pytest.mark.parametrize(
    ("num", "num_keys", "dim", "dtype"),
    [
        (7, 1000, 16, torch.float32),
        (35, 330, 128, torch.bfloat16),
        (3, 1, 5, torch.float32),
        (1, 65, 200, torch.float32),
        (2, 70, 256, torch.bfloat16),
    ],
)
def test_infonce_equals_float64(num: int, num_keys: int, dim: int, dtype: torch.dtype) -> None:
    query, negatives = unit_rows(num, dim, seed=0), unit_rows(num_keys, dim, seed=1).to(dtype)
    key = normalize(query + 0.7 * unit_rows(num, dim, seed=2))
    require_equal_to_float64(query, key, negatives, temperature=0.07)


def test_infonce_takes_columns_and_rows_that_are_not_dense() -> None:
    query, key = unit_rows(5, 20, seed=0)[:, :16], unit_rows(16, 5, seed=1).T
    require_equal_to_float64(query, key, unit_rows(16, 80, seed=2).T, temperature=0.2)
    require_equal_to_float64(query, key, unit_rows(80, 20, seed=2)[:, :16], temperature=0.2)


def test_infonce_with_large_logits_neither_overflows_nor_vanishes() -> None:
    query = 300.0 * torch.eye(16, device=DEVICE)
    loss, gradient, top1, _ = infonce_kernels(query, query, torch.cat([query, -query]), 0.1)
    assert loss.item() == pytest.approx(0.693147, abs=1e-5)
    assert gradient.isfinite().all()
    assert top1.item() == 1.0


def test_ranges_of_keys_fill_the_device_and_stay_below_a_tenth_of_the_logits() -> None:
    for num, num_keys, dim in ((256, 65_536, 128), (32, 65_536, 128), (4096, 65_536, 128), (256, 2**22, 256)):
        block_n, splits = tiling(num, num_keys, dim, num_sms=132)
        assert splits * num * (dim + 3) < max(0.1 * num * (num_keys + 1), 1.1 * 2**20)
        assert -(-num // block_n) * splits >= 132
    assert tiling(1, 1, 128, num_sms=132) == (16, 1)


def test_tensors_that_infonce_does_not_take_are_told() -> None:
    rows = unit_rows(4, 300, seed=0)
    with pytest.raises(Unsuited, match="C=300 is above the 256"):
        infonce_kernels(rows, rows, rows, 0.1)
    with pytest.raises(Unsuited, match=r"queries and keys are torch.float64 and torch.float64"):
        infonce_kernels(rows.double(), rows.double(), rows, 0.1)
    with pytest.raises(Unsuited, match=r"negatives are torch.float16"):
        infonce_kernels(rows, rows, rows.half(), 0.1)


def tensors(*, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5000,), (3, 4, 5, 5), (2,), ()]
    found = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
    found[1] = found[1].to(memory_format=torch.channels_last)
    return found


@pytest.mark.parametrize("with_copies", [False, True])
def test_sgd_ema_equals_torch_sgd_then_lerp(with_copies: bool) -> None:
    weights, keys = tensors(seed=0), tensors(seed=1)
    plain, plain_keys = [w.clone().requires_grad_() for w in weights], [k.clone() for k in keys]
    copies = ([w.bfloat16() for w in weights], [k.bfloat16() for k in keys]) if with_copies else None
    update = SgdEma(weights, [torch.zeros_like(w) for w in weights], keys, copies=copies)
    sgd = torch.optim.SGD(plain, lr=0.1, momentum=0.9, weight_decay=1e-2)
    for step in range(3):
        # Contiguous gradients: that of a channels_last weight lies otherwise.
        for weight, gradient in zip(plain, tensors(seed=2 + step), strict=True):
            weight.grad = gradient.contiguous()
        sgd.step()
        torch._foreach_lerp_(plain_keys, [w.detach() for w in plain], 0.1)
        update.step([w.grad for w in plain], lr=0.1, sgd_momentum=0.9, weight_decay=1e-2, ema_momentum=0.9)
    torch.testing.assert_close(weights, [w.detach() for w in plain])
    torch.testing.assert_close(keys, plain_keys)
    # The interpreter cuts where a device rounds: one unit in the last of 8 places.
    for copy, wide in zip([*copies[0], *copies[1]] if copies else [], weights + keys, strict=bool(copies)):
        torch.testing.assert_close(copy.float(), wide, rtol=2**-7, atol=0)


def test_the_update_of_all_tensors_is_one_launch_and_addresses_are_sent_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from linerate.train.kernels import sgd_ema

    launches = []

    class Counting:
        def __getitem__(self, grid: object) -> object:
            return lambda *args, **kwargs: launches.append(args[0])

    monkeypatch.setattr(sgd_ema, "_update", Counting())
    weights, gradients = tensors(seed=0), tensors(seed=1)
    update = SgdEma(weights, tensors(seed=2), tensors(seed=3))
    for _ in range(3):
        update.step(gradients, lr=0.1, sgd_momentum=0.9, weight_decay=0.0, ema_momentum=0.9)
    assert len(launches) == 3
    assert launches[0] is launches[2]
    update.step(tensors(seed=4), lr=0.1, sgd_momentum=0.9, weight_decay=0.0, ema_momentum=0.9)
    assert launches[3] is not launches[0]


def test_twins_that_lie_otherwise_in_memory_are_refused() -> None:
    weights = tensors(seed=0)
    with pytest.raises(ValueError, match="must be dense and lie alike in memory"):
        SgdEma(weights, weights, [w.contiguous() for w in weights])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num", [32, 256, 1024])
def test_infonce_on_a_gpu_equals_float64_at_full_size(num: int, dtype: torch.dtype) -> None:
    query, negatives = unit_rows(num, 128, seed=0), unit_rows(65_536, 128, seed=1).to(dtype)
    key = normalize(query + 0.7 * unit_rows(num, 128, seed=2))
    require_equal_to_float64(query, key, negatives, temperature=0.07)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    infonce_kernels(query, key, negatives, 0.07)
    assert torch.cuda.max_memory_allocated() - before < 0.1 * num * 65_537 * 4


@pytest.mark.gpu
def test_infonce_on_a_gpu_takes_the_kernels_and_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    from linerate.train.kernels import infonce as module

    calls = []
    inner = module.infonce_kernels
    monkeypatch.setattr(module, "infonce_kernels", lambda *rows: calls.append(1) or inner(*rows))
    query, negatives = unit_rows(256, 128, seed=0).requires_grad_(), unit_rows(4096, 128, seed=1)
    infonce(query, query.detach(), negatives, temperature=0.07).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        infonce(query, query.detach(), negatives, temperature=0.07).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 2


@pytest.mark.gpu
def test_bfloat16_copies_on_a_gpu_are_rounded_to_nearest() -> None:
    weights, keys = tensors(seed=0), tensors(seed=1)
    copies = ([w.bfloat16() for w in weights], [k.bfloat16() for k in keys])
    update = SgdEma(weights, [torch.zeros_like(w) for w in weights], keys, copies=copies)
    update.step(tensors(seed=2), lr=0.1, sgd_momentum=0.9, weight_decay=1e-2, ema_momentum=0.9)
    for copy, wide in zip(copies[0] + copies[1], weights + keys, strict=True):
        assert torch.equal(copy, wide.bfloat16())

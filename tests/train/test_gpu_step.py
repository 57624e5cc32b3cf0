"""The step on a GPU; each test names its twin on the CPU, which every machine runs.

The bounds say what arithmetic may change: bf16 and the order of sums, nothing else.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.needs_gpu import needs_gpu
from tests.train.small import SMALL
from torch import Tensor

from linerate.pipeline.two_views import TwoViews
from linerate.train.checkpoint import TrainedOn, load_checkpoint, save_checkpoint
from linerate.train.config import Speed, TrainConfig
from linerate.train.encoder import build_encoder
from linerate.train.infonce import infonce, infonce_plain
from linerate.train.key_queue import KeyQueue
from linerate.train.launch import open_accelerator
from linerate.train.learner import Learner
from linerate.train.step import MoCo, train_step

TRAINED_ON = TrainedOn(plan_id="plan", num_samples=64, folder="shards")


@contextlib.contextmanager
def syncs_are_errors() -> Iterator[None]:
    """Whatever makes the host wait for the device raises RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def pixels(num: int = 16, *, size: int = 32, seed: int = 0, device: str = "cuda") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (num, size, size, 3), dtype=torch.uint8, generator=generator)
    return image.to(device).permute(0, 3, 1, 2)


def build(
    device: str, *, dtype: torch.dtype = torch.float32, channels_last: bool = True, bn_group: int | None = 4
) -> tuple[MoCo, torch.optim.Optimizer]:
    torch.manual_seed(0)
    encoder = build_encoder("tiny-resnet-w16", dim=16, stem="cifar").to(dtype)
    queue = KeyQueue(64, 16, dtype=dtype, generator=torch.Generator().manual_seed(1))
    moco = MoCo(encoder, queue, bn_group=bn_group, ema_momentum=0.9).to(device, channels_last=channels_last)
    sgd = torch.optim.SGD(moco.query_encoder.parameters(), lr=0.05, momentum=0.9, foreach=True)
    return moco, sgd


def losses(
    built: tuple[MoCo, torch.optim.Optimizer], *, steps: int = 3, bf16: bool = False, device: str = "cuda"
) -> Tensor:
    moco, sgd = built
    found = [
        train_step(
            moco,
            pixels(seed=2 * step, device=device),
            pixels(seed=2 * step + 1, device=device),
            sgd,
            step=step,
            autocast=lambda: torch.autocast(device, torch.bfloat16, enabled=bf16),
        ).loss
        for step in range(steps)
    ]
    return torch.stack(found).cpu()


def batch(seed: int, device: str = "cuda") -> TwoViews:
    query, key = (pixels(size=16, seed=2 * seed + view, device=device) for view in (0, 1))
    place = torch.arange(16)
    return TwoViews(query=query, key=key, sample_id=place, position=place, label=place)


def small(**speed: object) -> TrainConfig:
    return dataclasses.replace(SMALL, speed=Speed(**speed))  # type: ignore[arg-type]


@needs_gpu("that the step computes on a GPU what it computes on a CPU")
def test_the_step_on_a_gpu_follows_the_cpus_curve_in_float64() -> None:
    """Twin: test_algorithm1.py, which holds the CPU's step against the paper's pseudocode."""
    curves = [
        losses(build(device, dtype=torch.float64), steps=5, device=device) for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-6, atol=1e-6)


@needs_gpu("that no step makes the host wait for the GPU, with bf16 autocast and shuffled BN groups")
@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_makes_the_host_wait_at_no_time(bf16: bool) -> None:
    """Twin: test_step.py::test_a_step_reads_the_device_at_no_time."""
    built = build("cuda")
    moco, sgd = built
    losses(built, steps=1, bf16=bf16)  # the optimizer's state, cuDNN's choices
    views = pixels(), pixels(seed=1)
    with syncs_are_errors():
        for step in (1, 2):
            train_step(
                moco,
                *views,
                sgd,
                step=step,
                autocast=lambda: torch.autocast("cuda", torch.bfloat16, enabled=bf16),
            )
    with syncs_are_errors(), pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(1, device="cuda").item()


@needs_gpu("that the learner under accelerate makes the host wait only where it reads the metrics")
def test_the_learner_waits_only_where_it_reads_the_metrics(tmp_path: Path) -> None:
    """Twin: test_learner.py::test_steps_never_read_the_device_and_the_log_reads_it_once."""
    with open_accelerator(SMALL, run_dir=tmp_path) as accelerator:
        assert accelerator.device.type == "cuda"
        learner = Learner(SMALL, accelerator)
        learner.step(batch(0), step=0, lr=0.1)
        batches = [batch(1), batch(2)]
        with syncs_are_errors():
            for step, views in enumerate(batches, start=1):
                learner.step(views, step=step, lr=0.1)
        means, _ = learner.read_metrics(stop=False)
        assert 0 < means["loss"] < 20


@needs_gpu("that bf16 autocast stays near float32, with float32 weights, keys and loss")
def test_bf16_autocast_stays_near_float32_and_the_master_weights_are_float32() -> None:
    """Twin: test_step.py::test_both_encoders_get_the_autocast."""
    fp32, bf16 = build("cuda"), build("cuda")
    torch.testing.assert_close(losses(bf16, bf16=True), losses(fp32), rtol=0.03, atol=0.03)
    assert {p.dtype for p in bf16[0].query_encoder.parameters()} == {torch.float32}
    assert {p.dtype for p in bf16[0].key_encoder.parameters()} == {torch.float32}
    assert bf16[0].dictionary.keys.dtype == torch.float32


@needs_gpu("that channels_last changes no result on a GPU")
def test_channels_last_changes_nothing_but_the_layout() -> None:
    """Twin: test_step.py::test_moving_keeps_the_parameters_that_the_optimizer_holds."""
    nhwc, nchw = build("cuda"), build("cuda", channels_last=False)
    weight = next(p for p in nhwc[0].query_encoder.parameters() if p.ndim == 4)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    with exact_convolutions():
        torch.testing.assert_close(losses(nhwc), losses(nchw), rtol=1e-3, atol=1e-3)


def exact_convolutions() -> contextlib.AbstractContextManager[None]:
    """Neither TF32 nor an algorithm that adds in another order each time."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore")  # the compiler's advice
@needs_gpu("that compiled encoders give eager's curve on a GPU, and wait for nothing")
def test_compiled_encoders_follow_the_eager_curve_and_wait_for_nothing(tmp_path: Path) -> None:
    """Twin: test_compiled.py, where the compiler traces the encoders and leaves the kernels as they are."""
    found = []
    for compiled in (False, True):
        config = small(precision="fp32", compile=compiled)
        with open_accelerator(config, run_dir=tmp_path) as accelerator, exact_convolutions():
            learner = Learner(config, accelerator)
            for step in range(2):
                learner.step(batch(step), step=step, lr=0.1)
            views = batch(2)
            with syncs_are_errors():
                learner.step(views, step=2, lr=0.1)
            found.append(learner.read_metrics(stop=False)[0]["loss"])
    assert found[1] == pytest.approx(found[0], rel=5e-3)


@needs_gpu("that the queue on a GPU holds the very keys of the queue on a CPU, without a host sync")
@pytest.mark.parametrize(("num_keys", "num_new"), [(20, 8), (7, 16), (64, 64)])
def test_enqueue_on_a_gpu_is_enqueue_on_a_cpu_without_a_sync(num_keys: int, num_new: int) -> None:
    """Twin: test_key_queue.py, the same claims against a list."""
    here, there = (KeyQueue(num_keys, 4, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    there.to("cuda")
    for turn in range(5):
        keys = torch.randn(num_new, 4, generator=torch.Generator().manual_seed(turn))
        on_gpu = keys.to("cuda")
        here.enqueue(keys)
        with syncs_are_errors():
            there.enqueue(on_gpu)
    assert torch.equal(there.keys.cpu(), here.keys)
    assert torch.equal(there.ages().cpu(), here.ages())


@needs_gpu("that InfoNCE on a GPU is the plain form's loss and gradient, and holds no N x K logits")
@pytest.mark.parametrize("negatives_dtype", [torch.float32, torch.bfloat16])
def test_infonce_on_a_gpu_is_the_plain_form_in_a_tenth_of_its_memory(negatives_dtype: torch.dtype) -> None:
    """Twin: test_infonce.py, the same claims on the CPU."""
    num, num_keys, dim = 256, 65536, 128
    generator = torch.Generator("cuda").manual_seed(0)
    rows = [
        torch.nn.functional.normalize(torch.randn(n, dim, device="cuda", generator=generator))
        for n in (num, num, num_keys)
    ]
    query, key, negatives = rows[0].requires_grad_(), rows[1], rows[2].to(negatives_dtype)
    infonce(query, key, negatives, temperature=0.07)  # cuBLAS takes its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with syncs_are_errors():
        found = infonce(query, key, negatives, temperature=0.07)
        found.loss.backward()  # type: ignore[no-untyped-call]
    assert torch.cuda.max_memory_allocated() - before < 0.1 * num * (num_keys + 1) * 4
    assert query.grad is not None
    gradient, query.grad = query.grad, None
    doubled = query.detach().double().requires_grad_()
    truth = infonce_plain(doubled, key.double(), negatives.double(), temperature=0.07)
    truth.loss.backward()  # type: ignore[no-untyped-call]
    assert doubled.grad is not None
    torch.testing.assert_close(found.loss.double(), truth.loss, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(gradient.double(), doubled.grad, rtol=2e-2, atol=2e-5)


@needs_gpu("that a checkpoint of a GPU run goes on bit for bit on a GPU, and is readable on a CPU")
def test_a_checkpoint_goes_on_bit_for_bit_and_leaves_the_gpu(tmp_path: Path) -> None:
    """Twin: test_learner.py::test_a_restored_learner_goes_on_bit_for_bit."""
    with open_accelerator(SMALL, run_dir=tmp_path) as accelerator, exact_convolutions():
        first, second = Learner(SMALL, accelerator), Learner(SMALL, accelerator)
        first.step(batch(0), step=0, lr=0.1)
        saved = first.checkpoint(step=1, epoch=0, trained_on=TRAINED_ON)
        assert saved.rng.keys() == {"cpu", "cuda"}
        loaded = load_checkpoint(save_checkpoint(tmp_path / "checkpoints", saved, keep=1))
        assert {tensor.device.type for tensor in loaded.moco.values()} == {"cpu"}
        second.restore(loaded)
        for learner in (first, second):
            learner.step(batch(1), step=1, lr=0.1)
        ours, theirs = first.moco.state_dict(), second.moco.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@needs_gpu("that micro-batches on a GPU count as one batch")
def test_micro_batches_on_a_gpu_are_one_batch() -> None:
    """Twin: test_algorithm1.py and test_step.py::test_micro_batches_count_as_one_batch_..."""
    (whole, whole_sgd), (parts, parts_sgd) = (build("cuda", dtype=torch.float64) for _ in range(2))
    views = pixels(), pixels(seed=1)
    one = train_step(whole, *views, whole_sgd, step=0)
    two = train_step(parts, *views, parts_sgd, step=0, micro_batch=8)
    torch.testing.assert_close(one.loss, two.loss)
    for mine, theirs in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)

"""MoCo under accelerate on one rank: built from a config, stepped, read, saved and restored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from linerate.pipeline.two_views import TwoViews
from linerate.train import kernels
from linerate.train.alarms import Vitals
from linerate.train.checkpoint import Checkpoint, TrainedOn
from linerate.train.compiled import compile_step, set_lr
from linerate.train.config import TrainConfig
from linerate.train.encoder import build_encoder
from linerate.train.evaluate.features import Encode
from linerate.train.graphs import CudaRecorder, RecordedPasses
from linerate.train.in_batch import InBatch
from linerate.train.key_queue import KeyQueue
from linerate.train.key_stream import KeyStream
from linerate.train.launch import open_autocast, quiet_ddp
from linerate.train.memory_bank import MemoryBank
from linerate.train.moco import MoCo
from linerate.train.negatives import KeyDictionary
from linerate.train.optimizers import build_optimizer
from linerate.train.shuffle_bn import KeyShuffle, bn_modules
from linerate.train.step import train_step
from linerate.train.switches import resolve_switches


def build_moco(
    config: TrainConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_samples: int | None = None,
    device: torch.device | str = "cpu",
) -> MoCo:
    """Both encoders and the dictionary as the seed draws them: the same on every rank, on the CPU.

    num_samples, device: what a memory bank has rows for, and where they lie at once.
    """
    torch.manual_seed(config.seed)
    model, bn = config.model, config.bn
    encoder = build_encoder(model.encoder, dim=model.dim, head=model.head, stem=model.stem)
    encoder.require_size(config.views.size)
    return MoCo(
        encoder,
        _build_dictionary(config, rank=rank, world_size=world_size, num_samples=num_samples, device=device),
        temperature=config.loss.temperature,
        symmetric=config.loss.symmetric,
        ema_momentum=model.ema_momentum,
        bn_group=None if bn.sync_bn else bn.bn_group,
        sync_bn=bn.sync_bn,
        shuffle=KeyShuffle(
            seed=config.seed, block=bn.shuffle_block, enabled=bn.shuffle, rank=rank, world_size=world_size
        ),
    )


def _build_dictionary(
    config: TrainConfig, *, rank: int, world_size: int, num_samples: int | None, device: torch.device | str
) -> KeyDictionary:
    about, dim = config.dictionary, config.model.dim
    if about.dictionary == "queue":
        return KeyQueue(about.num_keys, dim, dtype=_QUEUE_DTYPES[about.queue_dtype])
    if about.dictionary == "end-to-end":
        return InBatch()
    if num_samples is None:
        raise ValueError("a memory bank has a row for every sample; say how many there are")
    return MemoryBank(
        num_samples,
        about.num_keys,
        dim,
        momentum=about.bank_momentum,
        loss=about.bank_loss,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        device=device,
    )


_QUEUE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Learner:
    """What learns on this rank. Between two calls of read_metrics nothing makes the host wait."""

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, *, num_samples: int | None = None
    ) -> None:
        """num_samples: samples in the data set, which a memory bank must know."""
        self.config, self.accelerator = config, accelerator
        self.switches = resolve_switches(
            config, world_size=accelerator.num_processes, device_type=accelerator.device.type
        )
        self._autocast = open_autocast(accelerator, config.speed)
        moco = build_moco(
            config,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_samples=num_samples,
            device=accelerator.device,
        )
        self.moco = moco.to(accelerator.device, channels_last=config.speed.channels_last)
        built = build_optimizer(config.optim, moco, fused_update=config.speed.fused_update)
        with quiet_ddp():
            query_forward, self.optimizer = accelerator.prepare(moco.query_encoder, built)
        moco.query_forward = query_forward
        compile_step(moco, built, what=self.switches.compile)
        if self.switches.side_stream:
            moco.key_stream = KeyStream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
        self.recorded = (
            RecordedPasses(CudaRecorder(), moco.query_params) if self.switches.cuda_graphs else None
        )
        # As a tensor where the update is compiled: it would be compiled anew for every other number.
        self._lr = torch.zeros((), device=accelerator.device) if self.switches.compile == "step" else None
        self._vitals = Vitals(moco)
        self._sums = torch.zeros(3, device=accelerator.device)
        self._num_summed = 0

    def step(self, batch: TwoViews, *, step: int, lr: float, ema_momentum: float | None = None) -> None:
        """One MoCo step with this learning rate, and m where it is not the config's, on this rank's share."""
        if ema_momentum is not None:
            self.moco.ema_momentum = ema_momentum
        set_lr(self.optimizer, lr if self._lr is None else self._lr.fill_(lr))
        metrics = train_step(
            self.moco,
            batch.query,
            batch.key,
            self.optimizer,
            step=step,
            position=batch.position,
            micro_batch=self.config.speed.micro_batch,
            autocast=self._autocast,
            backward=self.accelerator.backward,
            recorded=self.recorded,
        )
        self._sums += torch.stack((metrics.loss, metrics.top1, metrics.top5))
        self._num_summed += 1

    def given_up(self) -> dict[str, str]:
        """Switches that are off after all, and why: they were tried and failed."""
        found = {}
        if self.recorded is not None and self.recorded.given_up is not None:
            found["cuda_graphs"] = self.recorded.given_up
        for kernel, switch in (("infonce", "kernels"), ("sgd_ema", "fused_update")):
            if kernel in kernels.given_up and getattr(self.switches, switch):
                found[switch] = f"the kernel {kernel} failed: {kernels.given_up[kernel]}"
        return found

    def switch_words(self) -> dict[str, str]:
        """Each switch with its state as it stands now, as `off: no CUDA device`."""
        failed = {name: f"off: {why}" for name, why in self.given_up().items()}
        return self.switches.words() | failed

    def read_metrics(self, *, replaced: int = 0) -> dict[str, float]:
        """Means over the steps since the last call and over all ranks.

        replaced: samples that this rank has replaced; comes back as the sum over the ranks. With them comes
        what the dictionary tells of itself.
        The one place where the host waits for the device; all ranks call it after the same step.
        """
        own = torch.tensor([float(replaced)], device=self._sums.device)
        stats = self.moco.dictionary.stats()
        parts = (
            self._sums / self._num_summed,
            self._vitals.read(),
            *(value[None] for value in stats.values()),
        )
        *means, replaced_mean = self.accelerator.reduce(torch.cat((*parts, own)), "mean").tolist()
        self._sums.zero_()
        self._num_summed = 0
        names = ("loss", "pretext_top1", "pretext_top5", *Vitals.NAMES, *stats)
        found = dict(zip(names, means, strict=True))
        return found | {"replaced": round(replaced_mean * self.accelerator.num_processes)}

    @torch.no_grad()
    def average_bn(self) -> None:
        """Give every rank the mean of all ranks' running BN statistics; training itself never reads them."""
        if self.accelerator.num_processes == 1:
            return
        buffers = [
            buffer
            for encoder in {self.moco.query_encoder: None, self.moco.key_encoder: None}
            for module in bn_modules(encoder)
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]
        mean = self.accelerator.reduce(torch.cat([buffer.flatten() for buffer in buffers]), "mean")
        for buffer, part in zip(buffers, mean.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))

    @contextlib.contextmanager
    def encoding(self, features: Literal["backbone", "projection"]) -> Iterator[Encode]:
        """The query encoder in eval mode, as kNN calls it; back in training mode afterwards."""
        encoder = self.moco.query_encoder.eval()

        def encode(images: Tensor) -> Tensor:
            with self._autocast():
                found: Tensor = encoder.features(images) if features == "backbone" else encoder(images)  # type: ignore[operator]
            return found

        try:
            yield encode
        finally:
            encoder.train()

    def is_finite(self) -> bool:
        """Whether all of the state, and the losses since they were last read, are finite on every rank.

        The host waits for the device; all ranks call it after the same step.
        """
        found = torch.isfinite(self._sums).all()
        for tensor in self.moco.own_state().values():
            if tensor.is_floating_point():
                found &= torch.isfinite(tensor).all()
        return bool(self.accelerator.reduce(found.float(), "mean").item() == 1.0)

    def checkpoint(self, *, step: int, epoch: int, trained_on: TrainedOn) -> Checkpoint:
        """Everything that `restore` needs; tensors are the live ones, so write it before the next step.

        Every rank calls it, the one of rank 0 is complete: a memory bank lies on all of them.
        """
        rng = {"cpu": torch.get_rng_state()}
        if self.accelerator.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.accelerator.device)
        return Checkpoint(
            step=step,
            epoch=epoch,
            images=step * self.config.optim.global_batch,
            config=self.config,
            trained_on=trained_on,
            moco=self.moco.state_dict(),
            optimizer=self.optimizer.state_dict(),
            rng=rng,
            scaler=scaler.state_dict() if (scaler := self.accelerator.scaler) else None,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's state. Raises UserError where it is of another model."""
        self.moco.load_state_dict(checkpoint.moco)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        if self.accelerator.scaler and checkpoint.scaler:
            self.accelerator.scaler.load_state_dict(checkpoint.scaler)
        torch.set_rng_state(checkpoint.rng["cpu"])
        if "cuda" in checkpoint.rng and self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint.rng["cuda"], self.accelerator.device)

"""MoCo under accelerate on one rank: built from a config, stepped, read, saved and restored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from linerate.pipeline.two_views import TwoViews
from linerate.train.checkpoint import Checkpoint, TrainedOn
from linerate.train.config import TrainConfig
from linerate.train.encoder import build_encoder
from linerate.train.evaluate.features import Encode
from linerate.train.key_queue import KeyQueue
from linerate.train.launch import quiet_ddp
from linerate.train.optimizers import build_optimizer
from linerate.train.shuffle_bn import KeyShuffle, bn_modules
from linerate.train.step import MoCo, train_step


def build_moco(config: TrainConfig, *, rank: int = 0, world_size: int = 1) -> MoCo:
    """Both encoders and the queue as the seed draws them: the same on every rank."""
    torch.manual_seed(config.seed)
    model, bn = config.model, config.bn
    encoder = build_encoder(model.encoder, dim=model.dim, head=model.head, stem=model.stem)
    encoder.require_size(config.views.size)
    return MoCo(
        encoder,
        KeyQueue(config.dictionary.num_keys, model.dim),
        temperature=config.loss.temperature,
        ema_momentum=model.ema_momentum,
        bn_group=bn.bn_group,
        shuffle=KeyShuffle(
            seed=config.seed, block=bn.shuffle_block, enabled=bn.shuffle, rank=rank, world_size=world_size
        ),
    )


class Learner:
    """What learns on this rank. Between two calls of read_metrics nothing makes the host wait."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        moco = build_moco(config, rank=accelerator.process_index, world_size=accelerator.num_processes)
        self.moco = moco.to(accelerator.device, channels_last=config.speed.channels_last)
        built = build_optimizer(config.optim, moco, fused_update=config.speed.fused_update)
        with quiet_ddp():
            query_forward, self.optimizer = accelerator.prepare(moco.query_encoder, built)
        moco.query_forward = query_forward
        if config.speed.compile:
            moco.query_forward = torch.compile(query_forward)
            moco.key_forward = torch.compile(moco.key_encoder)
        self._sums = torch.zeros(3, device=accelerator.device)
        self._num_summed = 0

    def step(self, batch: TwoViews, *, step: int, lr: float, ema_momentum: float | None = None) -> None:
        """One MoCo step with this learning rate, and m where it is not the config's, on this rank's share."""
        if ema_momentum is not None:
            self.moco.ema_momentum = ema_momentum
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        metrics = train_step(
            self.moco,
            batch.query,
            batch.key,
            self.optimizer,
            step=step,
            autocast=self.accelerator.autocast,
            backward=self.accelerator.backward,
        )
        self._sums += torch.stack((metrics.loss, metrics.top1, metrics.top5))
        self._num_summed += 1

    def read_metrics(self, *, stop: bool, replaced: int = 0) -> tuple[dict[str, float], bool]:
        """Means over the steps since the last call and over all ranks, and whether any rank was told to stop.

        replaced: samples that this rank has replaced; comes back as the sum over the ranks.

        The one place where the host waits for the device; all ranks call it after the same step.
        """
        own = torch.tensor([float(stop), float(replaced)], device=self._sums.device)
        means = self.accelerator.reduce(torch.cat((self._sums / self._num_summed, own)), "mean").tolist()
        self._sums.zero_()
        self._num_summed = 0
        found = dict(zip(("loss", "pretext_top1", "pretext_top5"), means, strict=False))
        return found | {"replaced": round(means[4] * self.accelerator.num_processes)}, means[3] > 0

    @torch.no_grad()
    def average_bn(self) -> None:
        """Give every rank the mean of all ranks' running BN statistics; training itself never reads them."""
        if self.accelerator.num_processes == 1:
            return
        buffers = [
            buffer
            for encoder in (self.moco.query_encoder, self.moco.key_encoder)
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
            with self.accelerator.autocast():
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
        for tensor in self.moco.state_dict().values():
            if tensor.is_floating_point():
                found &= torch.isfinite(tensor).all()
        return bool(self.accelerator.reduce(found.float(), "mean").item() == 1.0)

    def checkpoint(self, *, step: int, epoch: int, trained_on: TrainedOn) -> Checkpoint:
        """Everything that `restore` needs; tensors are the live ones, so write it before the next step."""
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
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's state. Raises UserError where it is of another model."""
        self.moco.load_state_dict(checkpoint.moco)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        torch.set_rng_state(checkpoint.rng["cpu"])
        if "cuda" in checkpoint.rng and self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint.rng["cuda"], self.accelerator.device)

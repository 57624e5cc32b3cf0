"""The loop of a classifier: SGD over labelled batches, the test after each epoch, a state that goes on.

Legend: a step is one global batch; steps and epochs count from 0 over the whole training, restarts included.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from linerate.shards.errors import UserError
from linerate.train.evaluate.classifier import FrozenBackbone, average_bn, hits
from linerate.train.evaluate.classifier_data import TestBatches, TrainBatches
from linerate.train.evaluate.classifier_folder import ClassifierFolder, ClassifierState
from linerate.train.evaluate.classifier_recipes import ClassifierConfig
from linerate.train.launch import quiet_ddp
from linerate.train.schedules import lr_at
from linerate.train.stop import StopRequest

STOP_STEPS = 20
"""How often many ranks agree on whether to stop."""
_LOSS, _TOP1, _TOP5, _IMAGES = range(4)


@contextlib.contextmanager
def open_ranks(*, bf16: bool) -> Iterator[Accelerator]:
    """Accelerate for this process: one of torchrun's ranks, or alone. bf16: whether the model computes so."""
    # accelerate keeps the first precision for the whole process; the next evaluation may want another.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if bf16 else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    try:
        yield accelerator
    finally:
        accelerator.free_memory()


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is told and kept; nothing here changes a result."""

    eval_epochs: int = 1
    """Epochs between two tests; there is one at the end in any case."""
    checkpoint_steps: int = 500
    """Steps between two states; one more is written at the end and on a signal."""
    on_epoch: Callable[[dict[str, Any]], None] = lambda _: None
    """Gets each line of the log, on rank 0."""
    advance: Callable[[float], None] = lambda _: None
    """Is told how many steps are done."""


class ClassifierTraining:
    """One classifier from its first step to its last, or to the one at which it is stopped."""

    def __init__(
        self,
        config: ClassifierConfig,
        module: nn.Module,
        *,
        backbone: FrozenBackbone | None,
        train: TrainBatches,
        test: TestBatches,
        folder: ClassifierFolder,
        about: dict[str, Any],
        accelerator: Accelerator,
        watch: Watch,
    ) -> None:
        """module: what learns; it takes the batches, or what the frozen backbone makes of them.

        about: what the folder's training is of. Raises UserError where it is another's.
        """
        self.config, self.train, self.test, self.watch = config, train, test, watch
        self.folder, self.accelerator, self.backbone = folder, accelerator, backbone
        # The bare module: what is saved, and what is tested on batches that differ between ranks.
        self.module = module.to(memory_format=torch.channels_last).train()
        sgd = torch.optim.SGD(
            module.parameters(),
            lr=config.lr,
            momentum=config.sgd_momentum,
            weight_decay=config.weight_decay,
            foreach=True,
        )
        with quiet_ddp():
            self._forward, self.optimizer = accelerator.prepare(module, sgd)
        self.total_steps = config.epochs * train.steps_per_epoch
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.stopped = False
        self._sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
        self._checked = backbone is None
        state = folder.load(about)
        if state is not None:
            self._restore(state)
        # Every rank has looked at the folder before rank 0 writes into it.
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            folder.start(about)
        watch.advance(self.step)

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    def run(self, stop: StopRequest) -> dict[str, Any] | None:
        """The last line of the log; None: it was stopped before the first test."""
        while not self.finished and not self.stopped:
            epoch, start_step = divmod(self.step, self.train.steps_per_epoch)
            with contextlib.closing(self.train.epoch(epoch, start_step=start_step)) as batches:
                for inputs, label in batches:
                    self._step(inputs, label)
                    if self.step % self.train.steps_per_epoch == 0:
                        self._end_epoch(epoch)
                    if self._stops(stop) or self.finished or self.step % self.watch.checkpoint_steps == 0:
                        self._save()
                    if self.stopped:
                        break
        return next((line for line in reversed(self.history) if "top1" in line), None)

    def _step(self, inputs: Tensor, label: Tensor) -> None:
        lr = self._lr(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        label = label.to(self.accelerator.device, non_blocking=True)
        logits = self._forward(self.backbone(inputs) if self.backbone else inputs).float()
        loss = cross_entropy(logits, label)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.optimizer.step()
        num = len(label)
        with torch.no_grad():
            self._sums += torch.cat(
                [loss.detach().double()[None] * num, hits(logits, label), loss.new_tensor([num]).double()]
            )
        self.step += 1
        self.watch.advance(1)

    def _lr(self, step: int) -> float:
        schedule, steps = self.config.schedule, self.train.steps_per_epoch
        return lr_at(schedule, lr=self.config.lr, step=step, steps_per_epoch=steps)

    def _stops(self, stop: StopRequest) -> bool:
        if self.accelerator.num_processes == 1:
            self.stopped = bool(stop)
        elif self.step % STOP_STEPS == 0 or self.step % self.train.steps_per_epoch == 0:
            asked = torch.tensor([float(bool(stop))], device=self.accelerator.device)
            self.stopped = bool(self.accelerator.reduce(asked, "sum").item())
        return self.stopped

    def _end_epoch(self, epoch: int) -> None:
        if self.backbone and not self._checked:
            self.backbone.require_unchanged()
            self._checked = True
        sums = self.accelerator.reduce(self._sums, "sum").tolist()
        self._sums.zero_()
        loss = sums[_LOSS] / sums[_IMAGES]
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} in epoch {epoch + 1} (lr {self._lr(self.step - 1):.3g}): it diverged; "
                f"the same command with a lower --lr and another --out begins anew"
            )
        line = {
            "epoch": epoch + 1,
            "step": self.step,
            "lr": self._lr(self.step - 1),
            "loss": loss,
            "train_top1": sums[_TOP1] / sums[_IMAGES],
            "train_top5": sums[_TOP5] / sums[_IMAGES],
        }
        if self.finished or (epoch + 1) % self.watch.eval_epochs == 0:
            line |= self._judge()
        self.history.append(line)
        if self.accelerator.is_main_process:
            self.watch.on_epoch(line | {"replaced": self.train.num_replaced})

    @torch.no_grad()
    def _judge(self) -> dict[str, float]:
        """top1 and top5 in [0, 1] over all test images, each of which one rank looks at."""
        average_bn(self.module, self.accelerator)
        self.module.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.accelerator.device)
        for inputs, label in self.test():
            logits = self.module(self.backbone(inputs) if self.backbone else inputs).float()
            found = hits(logits, label.to(logits.device))
            sums += torch.cat([found, found.new_tensor([len(label)])])
        self.module.train()
        top1, top5, num = self.accelerator.reduce(sums, "sum").tolist()
        return {"top1": top1 / num, "top5": top5 / num, "num_test": int(num)}

    def _save(self) -> None:
        average_bn(self.module, self.accelerator)
        sums = self.accelerator.reduce(self._sums, "mean").cpu()
        if self.accelerator.is_main_process:
            self.folder.save(
                ClassifierState(
                    step=self.step,
                    module=self.module.state_dict(),
                    optimizer=self.optimizer.state_dict(),
                    sums=sums,
                    history=self.history,
                )
            )
        self.accelerator.wait_for_everyone()

    def _restore(self, state: ClassifierState) -> None:
        self.module.load_state_dict(state.module)
        self.optimizer.load_state_dict(state.optimizer)
        self.step, self.history = state.step, [*state.history]
        self._sums.copy_(state.sums)

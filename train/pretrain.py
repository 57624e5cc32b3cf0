"""The loop: views in, MoCo steps, and around them log, checkpoints, kNN and the stop signal.

Legend: a step is one global batch; steps, epochs and images count from 0 over the whole run, restarts
included. Nothing here reads the device except every `log_steps`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from linerate.pipeline.cache import CacheOptions, open_shards
from linerate.pipeline.loader import ViewLoader, open_views
from linerate.pipeline.two_views import TwoViews
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.train.checkpoint import Checkpoint, TrainedOn, save_checkpoint
from linerate.train.config import TrainConfig
from linerate.train.launch import describe_device, open_accelerator, start_trackers, with_lanes
from linerate.train.learner import Learner
from linerate.train.monitor import KnnMonitor, Stopwatch, open_monitor
from linerate.train.plan import require_one_batch
from linerate.train.run_folder import RunFolder
from linerate.train.schedules import ema_momentum_at, lr_at, total_steps
from linerate.train.stop import StopRequest, stop_on_signals
from linerate.train.watchdog import Watchdog

OnEvent = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Where a run stands when pretrain() returns."""

    step: int
    """Steps done."""
    total_steps: int
    """Steps of the whole run."""
    images: int
    """Images seen."""
    world_size: int
    """Ranks that took part in this part of the run."""
    loss: float | None
    """Mean InfoNCE of the last logged steps; None: nothing was logged."""
    pretext_top1: float | None
    """Share of queries that found their key, of the same steps."""
    knn_top1: float | None
    """The monitor's last figure; None: it did not run."""
    stopped_by: str | None
    """The signal that ended it early, as SIGINT; None: it is finished."""
    checkpoint: str
    """The last checkpoint."""

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps


def pretrain(
    config: TrainConfig,
    *,
    shards: Path | str,
    run_dir: Path | str,
    cache: CacheOptions | None = None,
    resume: bool = False,
    on_event: OnEvent | None = None,
) -> Summary:
    """Run MoCo to its end, or until SIGINT or SIGTERM, and leave a checkpoint either way.

    shards: a folder, or a URL, whose shards are kept here as cache says.
    on_event gets every event of the run (start, step, knn, checkpoint, note, end), on rank 0 only.
    resume continues from the newest whole checkpoint and starts anew where there is none.
    Raises UserError before the first image is read, for whatever cannot work.
    """
    config, folder, catalog = with_lanes(config), RunFolder(Path(run_dir)), open_shards(shards, cache)
    require_one_batch(config.optim.global_batch, num_images=catalog.num_samples)
    with open_accelerator(config, run_dir=folder.root) as accelerator:
        run = _open_run(config, folder, catalog, accelerator, cache=cache, resume=resume, on_event=on_event)
        try:
            with stop_on_signals() as stop:
                run.train(stop)
            return run.summary(stop)
        finally:
            run.loader.close()
            accelerator.end_training()


def _open_run(
    config: TrainConfig,
    folder: RunFolder,
    catalog: Catalog,
    accelerator: Accelerator,
    *,
    cache: CacheOptions | None,
    resume: bool,
    on_event: OnEvent | None,
) -> _Run:
    checkpoint, notes = folder.resume(config, catalog) if resume else (None, [])
    if not resume:
        folder.require_unused()
    if accelerator.is_main_process:
        folder.require_writable()
    # accelerate calls a CPU rank's device cpu:0, which is no other one than cpu.
    device = "cpu" if accelerator.device.type == "cpu" else str(accelerator.device)
    monitor, reason = open_monitor(
        config.watch,
        catalog,
        size=config.views.size,
        device=device,
        num_threads=config.speed.loader_threads,
        cache=cache,
    )
    loader = open_views(
        catalog,
        recipe=config.views.recipe(),
        backend=config.views.backend,
        device=device,
        seed=config.seed,
        global_batch=config.optim.global_batch,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_lanes=config.lanes,
        num_threads=config.speed.loader_threads,
        prefetch=config.speed.prefetch,
        bad_share=config.watch.bad_share,
        on_bad=folder.bad_sample_log(rank=accelerator.process_index),
    )
    learner = Learner(config, accelerator)
    if checkpoint is not None:
        learner.restore(checkpoint)
    # Every rank has looked at the folder before rank 0 writes into it.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.start(config, done_steps=checkpoint.step if checkpoint else 0)
        start_trackers(accelerator, config)
    trained_on = TrainedOn.of(catalog)
    run = _Run(config, folder, accelerator, loader, learner, monitor, on_event, trained_on=trained_on)
    run.begin(checkpoint, notes=[*notes, *([reason] if reason else [])])
    return run


class _Run:
    """The state of pretrain() between two steps."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        accelerator: Accelerator,
        loader: ViewLoader,
        learner: Learner,
        monitor: KnnMonitor | None,
        on_event: OnEvent | None,
        *,
        trained_on: TrainedOn,
    ) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.loader, self.learner, self.monitor = loader, learner, monitor
        self.on_event, self.trained_on = on_event, trained_on
        self.steps_per_epoch = loader.steps_per_epoch
        self.total_steps = total_steps(config.schedule, steps_per_epoch=loader.steps_per_epoch)
        self.step = self.logged_step = 0
        self.saved_step = -1
        self.saved: Path | None = None
        self.stopped = False
        self.last: dict[str, float] = {}
        self.watch = Stopwatch()
        self.watchdog = Watchdog(
            config.watch.stall_seconds,
            where=self._where,
            stacks=folder.root / f"stall-rank{accelerator.process_index:05d}.txt",
        )

    def begin(self, checkpoint: Checkpoint | None, *, notes: list[str]) -> None:
        """Take the place where the checkpoint stands and say how the run is set up."""
        if checkpoint is not None:
            self.step = self.logged_step = self.saved_step = checkpoint.step
            self.saved = self.folder.checkpoint_path(checkpoint.step)
            notes = [*notes, f"continuing after step {self.step:,}"]
        self._emit(
            "start",
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            num_dropped=self.loader.num_dropped,
            chance_loss=math.log(self.config.dictionary.num_keys + 1),
            world_size=self.accelerator.num_processes,
            device=describe_device(self.accelerator, self.config.speed),
        )
        for note in notes:
            self._emit("note", text=note)

    def train(self, stop: StopRequest) -> None:
        """Every step from where the run stands to its end, or to the one at which it is stopped."""
        self.watch.restart()
        with self.watchdog:
            self._train(stop)
        if self.saved_step != self.step:
            self._save()
        self._emit("end", finished=self.step >= self.total_steps)

    def _train(self, stop: StopRequest) -> None:
        while not self._over():
            epoch, start_step = divmod(self.step, self.steps_per_epoch)
            with contextlib.closing(self._epoch_views(epoch, start_step)) as views:
                for batch in views:
                    self.watchdog.pat()
                    lr = self._lr(self.step)
                    self.learner.step(
                        batch, step=self.step, lr=lr, ema_momentum=self._ema_momentum(self.step)
                    )
                    self.step += 1
                    self._after_step(epoch, lr, stop)
                    if self._over():
                        break

    def summary(self, stop: StopRequest) -> Summary:
        """Where the run stands now."""
        finished = self.step >= self.total_steps
        return Summary(
            step=self.step,
            total_steps=self.total_steps,
            images=self.step * self.config.optim.global_batch,
            world_size=self.accelerator.num_processes,
            loss=self.last.get("loss"),
            pretext_top1=self.last.get("pretext_top1"),
            knn_top1=self.last.get("knn_top1"),
            stopped_by=None if finished or stop.signal is None else stop.signal.name,
            checkpoint=str(self.saved),
        )

    def _over(self) -> bool:
        return self.stopped or self.step >= self.total_steps

    def _lr(self, step: int) -> float:
        optim, schedule = self.config.optim, self.config.schedule
        return lr_at(schedule, lr=optim.lr, step=step, steps_per_epoch=self.steps_per_epoch)

    def _ema_momentum(self, step: int) -> float:
        return ema_momentum_at(
            self.config.schedule,
            ema_momentum=self.config.model.ema_momentum,
            step=step,
            steps_per_epoch=self.steps_per_epoch,
        )

    def _epoch_views(self, epoch: int, start_step: int) -> Generator[TwoViews, None, None]:
        yield from self.watch.waiting(self.loader.epoch(epoch, start_step=start_step))

    def _after_step(self, epoch: int, lr: float, stop: StopRequest) -> None:
        """What is due after the step just done, in this order: log, kNN, checkpoint."""
        watch = self.config.watch
        last = self.step >= self.total_steps
        if last or self.step % watch.log_steps == 0:
            self._log(epoch, lr, stop)
        elif self.accelerator.num_processes == 1:
            self.stopped = bool(stop)
        epoch_ends = self.step % self.steps_per_epoch == 0
        if self.monitor and (last or (epoch_ends and (epoch + 1) % watch.knn_epochs == 0)):
            self._judge(self.monitor, epoch + 1)
        if self.step % watch.checkpoint_steps == 0:
            self._save()

    def _log(self, epoch: int, lr: float, stop: StopRequest) -> None:
        """Read the device: one line of the log, and with many ranks their agreement on whether to stop."""
        steps = self.step - self.logged_step
        speed = self.watch.lap(images=steps * self.config.optim.global_batch)
        replaced = self.loader.replacements.num_replaced
        means, self.stopped = self.learner.read_metrics(stop=bool(stop), replaced=replaced)
        self.logged_step = self.step
        if not math.isfinite(means["loss"]):
            raise self._diverged(f"the loss is {means['loss']}")
        self.last |= means
        left_s = (self.total_steps - self.step) * self.config.optim.global_batch / speed["images_per_s"]
        self._emit("step", epoch=epoch, total_steps=self.total_steps, lr=lr, left_s=left_s, **means, **speed)

    def _diverged(self, what: str) -> UserError:
        return UserError(
            f"{what} at step {self.step} (lr {self._lr(self.step - 1):.3g}): it diverged; the last "
            f"checkpoint is {self.saved or 'none'}; start again with a lower --lr or --precision fp32"
        )

    def _judge(self, monitor: KnnMonitor, epochs_done: int) -> None:
        """kNN on rank 0 while the others wait; every rank leaves with the same BN statistics."""
        with self.watch.paused(), self.watchdog.paused():
            self.learner.average_bn()
            if self.accelerator.is_main_process:
                try:
                    with self.learner.encoding(self.config.watch.knn_features) as encode:
                        found = monitor.judge(encode)
                    self.last["knn_top1"] = found["knn_top1"]
                    self._emit("knn", epoch=epochs_done, **found)
                except UserError as error:
                    self._emit("note", text=f"no kNN after epoch {epochs_done}: {error}")
            self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        with self.watch.paused(), self.watchdog.paused():
            self.learner.average_bn()
            # The log reads the loss at steps of its own: a NaN may not push out the last good checkpoint.
            if not self.learner.is_finite():
                raise self._diverged("the loss or a weight is not finite")
            if self.accelerator.is_main_process:
                epoch = self.step // self.steps_per_epoch
                checkpoint = self.learner.checkpoint(step=self.step, epoch=epoch, trained_on=self.trained_on)
                keep = self.config.watch.keep_checkpoints
                save_checkpoint(self.folder.checkpoints, checkpoint, keep=keep)
            self.saved_step = self.step
            self.saved = self.folder.checkpoint_path(self.step)
            self._emit("checkpoint", path=str(self.saved))
            self.accelerator.wait_for_everyone()

    def _where(self) -> str:
        epoch, step = divmod(self.step, self.steps_per_epoch)
        rank = self.accelerator.process_index
        return f"rank {rank} after step {self.step:,} (epoch {epoch}, step {step:,} of it)"

    def _emit(self, kind: str, **fields: Any) -> None:
        if not self.accelerator.is_main_process:
            return
        event = {"event": kind, "step": self.step, **fields}
        self.folder.append(event)
        if self.config.watch.trackers and kind in ("step", "knn"):
            numbers = {k: v for k, v in fields.items() if isinstance(v, int | float)}
            self.accelerator.log(numbers, step=self.step)
        if self.on_event is not None:
            self.on_event(event)

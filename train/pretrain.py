"""The loop: views in, MoCo steps, and around them log, checkpoints, kNN and the stop signal.

Legend: a step is one global batch; steps, epochs and images count from 0 over the whole run, restarts
included. Nothing here reads the device except every `log_steps`.
"""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from linerate.pipeline.cache import CacheOptions, open_shards
from linerate.pipeline.cores import usable_cores
from linerate.pipeline.loader import ViewLoader, open_views
from linerate.pipeline.two_views import TwoViews
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.train.agreement import Agreement, relay_stops
from linerate.train.checkpoint import Checkpoint, TrainedOn, save_checkpoint
from linerate.train.config import TrainConfig
from linerate.train.evaluate.features import Encode
from linerate.train.launch import (
    describe_device,
    launch_note,
    loader_threads,
    open_accelerator,
    parent_command,
    with_lanes,
)
from linerate.train.learner import Learner
from linerate.train.monitor import DEFECTS, FAILURES, KnnMonitor, StopCame, Stopwatch, open_monitor
from linerate.train.plan import require_one_batch
from linerate.train.report import OnEvent, Report, Summary
from linerate.train.run_folder import RunFolder
from linerate.train.schedules import ema_momentum_at, lr_at, total_steps
from linerate.train.stop import LEAVE_S, StopRequest, stop_on_signals
from linerate.train.trackers import finish_trackers, start_trackers
from linerate.train.watchdog import Watchdog

__all__ = ["OnEvent", "Summary", "pretrain"]


def pretrain(
    config: TrainConfig,
    *,
    shards: Path | str,
    run_dir: Path | str,
    cache: CacheOptions | None = None,
    resume: bool = False,
    on_event: OnEvent | None = None,
) -> Summary:
    """Run MoCo to its end, or until SIGINT, SIGTERM or SIGUSR1, and leave a checkpoint either way.

    shards: a folder, or a URL, whose shards are kept here as cache says.
    on_event gets every event of the run (start, step, knn, checkpoint, alarm, note, end), on rank 0 only.
    resume continues from the newest whole checkpoint and starts anew where there is none.
    Raises UserError before the first image is read, for whatever cannot work.
    """
    config, folder, catalog = with_lanes(config), RunFolder(Path(run_dir)), open_shards(shards, cache)
    require_one_batch(config.optim.global_batch, num_images=catalog.num_samples)
    with (
        stop_on_signals() as stop,
        open_accelerator(config, run_dir=folder.root) as accelerator,
        relay_stops(stop, world_size=accelerator.num_processes),
    ):
        run = _open_run(
            config, folder, catalog, accelerator, stop, cache=cache, resume=resume, on_event=on_event
        )
        try:
            run.train()
            return run.summary()
        finally:
            run.loader.close()
            finish_trackers(accelerator)
            accelerator.end_training()


def _open_run(
    config: TrainConfig,
    folder: RunFolder,
    catalog: Catalog,
    accelerator: Accelerator,
    stop: StopRequest,
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
        # A run that does without DALI does so here too.
        backend="dali" if config.views.backend == "dali" else "torch",
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
        hw_decoder_load=config.speed.hw_decoder_load,
        bad_share=config.watch.bad_share,
        on_bad=folder.bad_sample_log(rank=accelerator.process_index),
    )
    learner = Learner(config, accelerator, num_samples=catalog.num_samples)
    if checkpoint is not None:
        learner.restore(checkpoint)
    if accelerator.scaler is not None:
        notes = [
            *notes,
            "fp16: the gradient scaler makes the host wait for the device each step; bf16 does not",
        ]
    # Every rank has looked at the folder before rank 0 writes into it.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        done_steps = checkpoint.step if checkpoint else 0
        folder.start(config, done_steps=done_steps)
        start_trackers(accelerator, config, run_dir=folder.root, done_steps=done_steps)
    alone = launch_note(accelerator.num_processes, command=parent_command())
    trained_on = TrainedOn.of(catalog)
    report = Report(config, folder, accelerator, on_event)
    run = _Run(config, folder, accelerator, stop, loader, learner, monitor, report, trained_on=trained_on)
    idle = [f"does nothing here: {fields}" for fields in config.idle_fields()]
    run.begin(checkpoint, notes=[*notes, *idle, *(note for note in (reason, alone) if note)])
    return run


class _Run:
    """The state of pretrain() between two steps."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        accelerator: Accelerator,
        stop: StopRequest,
        loader: ViewLoader,
        learner: Learner,
        monitor: KnnMonitor | None,
        report: Report,
        *,
        trained_on: TrainedOn,
    ) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.loader, self.learner, self.monitor = loader, learner, monitor
        self.report, self.trained_on = report, trained_on
        self.stop, self.agreement = stop, Agreement(stop, world_size=accelerator.num_processes)
        self.steps_per_epoch = loader.steps_per_epoch
        self.total_steps = total_steps(config.schedule, steps_per_epoch=loader.steps_per_epoch)
        self.step = self.logged_step = 0
        self.saved_step = -1
        self.saved: Path | None = None
        self.stopped_by: signal.Signals | None = None
        self.replaced_before = 0
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
            self.report.go_on(self.folder.load_log_until(self.step))
            self.replaced_before = int(self.report.last.get("replaced", 0))
        self._emit(
            "start",
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            num_dropped=self.loader.num_dropped,
            chance_loss=self.config.chance_loss,
            world_size=self.accelerator.num_processes,
            device=describe_device(self.accelerator, self.config.speed),
            loader_threads=loader_threads(self.config.speed),
            usable_cores=usable_cores(),
            switches=self.learner.switch_words(),
        )
        for note in notes:
            self._emit("note", text=note)

    def train(self) -> None:
        """Every step from where the run stands to its end, or to the one at which it is stopped."""
        self.watch.restart()
        with self.watchdog:
            self._train()
        self._save()
        self._emit("end", finished=self.step >= self.total_steps, switches=self.learner.switch_words())

    def _train(self) -> None:
        while not self._over():
            epoch, start_step = divmod(self.step, self.steps_per_epoch)
            with contextlib.closing(self.loader.epoch(epoch, start_step=start_step)) as views:
                while not self._over() and (batch := self._next(views)) is not None:
                    lr = self._lr(self.step)
                    self.learner.step(
                        batch, step=self.step, lr=lr, ema_momentum=self._ema_momentum(self.step)
                    )
                    self.step += 1
                    self._after_step(epoch, lr)

    def _next(self, views: Iterator[TwoViews]) -> TwoViews | None:
        """The next batch, when every rank has its own; None: the epoch is over, or the run is stopped."""
        with self.watch.waiting():
            with self.stop.at_once(self._stop_waiting):
                batch = next(views, None)
            self.watchdog.pat()
            if batch is not None and self.stopped_by is None:
                self._decide()
        return None if self.stopped_by else batch

    def _decide(self) -> None:
        """Agree with the other ranks on whether to stop before the next step."""
        number = self.agreement.signal()
        self.stopped_by = signal.Signals(number) if number else None

    def _stop_waiting(self) -> None:
        """Told to stop with no batch at hand: save now, for it may never come.

        It runs in the signal's handler, always between two steps. No other rank has begun the next one: that
        takes this rank's consent.
        """
        self._decide()
        self._save()
        self.stop.leave_within(LEAVE_S, after=f"{self.saved} is whole")

    def summary(self) -> Summary:
        """Where the run stands now."""
        finished, last = self.step >= self.total_steps, self.report.last
        return Summary(
            step=self.step,
            total_steps=self.total_steps,
            images=self.step * self.config.optim.global_batch,
            world_size=self.accelerator.num_processes,
            loss=last.get("loss"),
            pretext_top1=last.get("pretext_top1"),
            knn_top1=last.get("knn_top1"),
            alarms=self.report.alarms,
            given_up=tuple(self.report.given_up),
            stopped_by=None if finished or self.stopped_by is None else self.stopped_by.name,
            checkpoint=str(self.saved),
            replaced=int(last.get("replaced", 0)),
            damage=tuple(self.folder.damage()),
            bad_sample_logs=tuple(map(str, self.folder.bad_sample_logs())),
        )

    def _over(self) -> bool:
        return self.stopped_by is not None or self.step >= self.total_steps

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

    def _after_step(self, epoch: int, lr: float) -> None:
        """What is due after the step just done, in this order: log, kNN, checkpoint."""
        self.report.tell_given_up(self.step, self.learner.given_up())
        watch = self.config.watch
        last = self.step >= self.total_steps
        if last or self.step % watch.log_steps == 0:
            self._log(epoch, lr)
        epoch_ends = self.step % self.steps_per_epoch == 0
        if self.monitor and (last or (epoch_ends and (epoch + 1) % watch.knn_epochs == 0)):
            self._judge(self.monitor, epoch + 1)
        if self.step % watch.checkpoint_steps == 0 or self._is_milestone():
            self._save()

    def _is_milestone(self) -> bool:
        """Whether the checkpoint after the step just done is one to keep for ever."""
        every = self.config.watch.milestone_epochs * self.steps_per_epoch
        return every > 0 and self.step > 0 and self.step % every == 0

    def _log(self, epoch: int, lr: float) -> None:
        """Read the device: one line of the log."""
        steps = self.step - self.logged_step
        speed = self.watch.lap(images=steps * self.config.optim.global_batch)
        replaced = self.loader.replacements.num_replaced
        means = self.learner.read_metrics(replaced=replaced)
        means["replaced"] += self.replaced_before
        self.logged_step = self.step
        if not math.isfinite(means["loss"]):
            raise self._diverged(f"the loss is {means['loss']}")
        left_s = (self.total_steps - self.step) * self.config.optim.global_batch / speed["images_per_s"]
        about = {"epoch": epoch, "total_steps": self.total_steps, "lr": lr, "left_s": left_s}
        self.report.tell_steps(self.step, means, steps=steps, **about, **speed)

    def _diverged(self, what: str) -> UserError:
        """The alarm that ends a run, with exit code 2."""
        text = (
            f"{what} at step {self.step} (lr {self._lr(self.step - 1):.3g}): it diverged; the last "
            f"checkpoint is {self.saved or 'none'}; start again with a lower --lr or --precision fp32"
        )
        self._emit("alarm", alarm="not-finite", text=text, fatal=True)
        return UserError(text)

    def _judge(self, monitor: KnnMonitor, epochs_done: int) -> None:
        """kNN on rank 0 while the others wait; every rank leaves with the same BN statistics."""
        with self.watch.paused(), self.watchdog.paused():
            self.learner.average_bn()
            if self.accelerator.is_main_process:
                self._judge_here(monitor, epochs_done)
            self.accelerator.wait_for_everyone()

    def _judge_here(self, monitor: KnnMonitor, epochs_done: int) -> None:
        """A monitor that fails is told of and ends no run, unless by a defect of ours."""
        try:
            with self.learner.encoding(self.config.watch.knn_features) as encode:
                found = monitor.judge(self._unless_stopped(encode))
        except StopCame as stop:
            self._emit("note", text=f"no kNN after epoch {epochs_done}: {stop}")
        except DEFECTS:
            raise
        except FAILURES as error:
            self.report.tell_no_knn(self.step, error, epoch=epochs_done)
        else:
            self.report.tell_knn(self.step, found, epoch=epochs_done)

    def _unless_stopped(self, encode: Encode) -> Encode:
        """kNN of a large set takes minutes: a job that is to end has other use for them."""

        def checked(images: Tensor) -> Tensor:
            if self.stop.signal is not None:
                raise StopCame(f"{self.stop.signal.name} came")
            return encode(images)

        return checked

    def _save(self) -> None:
        """A checkpoint of the step just done, if there is none yet: every rank knows whether there is."""
        if self.saved_step == self.step:
            return
        with self.watch.paused(), self.watchdog.paused():
            self.learner.average_bn()
            # The log reads the loss at steps of its own: a NaN may not push out the last good checkpoint.
            if not self.learner.is_finite():
                raise self._diverged("the loss or a weight is not finite")
            # On every rank: what lies on several is brought together.
            epoch = self.step // self.steps_per_epoch
            checkpoint = self.learner.checkpoint(step=self.step, epoch=epoch, trained_on=self.trained_on)
            if self.accelerator.is_main_process:
                keep = self.config.watch.keep_checkpoints
                milestone = self._is_milestone()
                save_checkpoint(self.folder.checkpoints, checkpoint, keep=keep, milestone=milestone)
            self.saved_step = self.step
            self.saved = self.folder.checkpoint_path(self.step)
            self._emit("checkpoint", path=str(self.saved))
            self.accelerator.wait_for_everyone()

    def _where(self) -> str:
        epoch, step = divmod(self.step, self.steps_per_epoch)
        rank = self.accelerator.process_index
        return f"rank {rank} after step {self.step:,} (epoch {epoch}, step {step:,} of it)"

    def _emit(self, kind: str, **fields: Any) -> None:
        self.report.emit(kind, step=self.step, **fields)

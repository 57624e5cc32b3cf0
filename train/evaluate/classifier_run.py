"""`linerate eval linear` and `linerate eval finetune`: which encoders, which seeds, what comes out.

A finished part is not done again, an interrupted one goes on: OUT/<encoder>/seed-<n> holds one training.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from torch import nn

from linerate.pipeline.cores import default_num_threads
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.terminal import progress
from linerate.train.checkpoint import TrainedEncoder
from linerate.train.encoder import Encoder
from linerate.train.evaluate.classifier import FineTuned, FrozenBackbone, new_fc, weights_xxh3
from linerate.train.evaluate.classifier_data import (
    TestBatches,
    TrainBatches,
    centre_crops,
    feature_tests,
    open_cached_features,
    open_crops,
    open_feature_batches,
)
from linerate.train.evaluate.classifier_folder import ClassifierFolder
from linerate.train.evaluate.classifier_recipes import ClassifierConfig
from linerate.train.evaluate.classify import ClassifierTraining, Watch, open_ranks
from linerate.train.evaluate.controls import calibrate_bn, untrained_encoder
from linerate.train.evaluate.features import open_evaluation
from linerate.train.evaluate.judge import CALIBRATION_IMAGES
from linerate.train.evaluate.labelled import LabelledSplit
from linerate.train.plan import require_one_batch
from linerate.train.stop import StopRequest, stop_on_signals

Say = Callable[[str], None]
FAST = "fast variant: features of centre crops, extracted once, no augmentation; not the paper's protocol"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How often, with which controls, and what may not change a result."""

    out: Path
    num_runs: int = 1
    """Trainings of each encoder; their seeds differ."""
    controls: bool = False
    """Also the encoder before its first step."""
    precision: Literal["fp32", "bf16"] = "fp32"
    num_threads: int | None = None
    eval_epochs: int = 1
    checkpoint_steps: int = 500


@dataclass(frozen=True, kw_only=True)
class ClassifierOutcome:
    """What was found, and whether it is all that was asked for."""

    results: list[dict[str, Any]]
    """One for each encoder: its name, mean and deviation over the seeds, each run."""
    stopped_by: int | None
    """The signal that ended it early."""
    world_size: int
    is_main_process: bool


def run_classifiers(
    config: ClassifierConfig,
    trained: TrainedEncoder,
    labelled: LabelledSplit,
    options: RunOptions,
    *,
    head: Sequence[str] = (),
    say: Say = lambda _: None,
) -> ClassifierOutcome:
    """Train and judge a classifier for each encoder and seed, or until SIGINT or SIGTERM.

    say gets lines for people, on rank 0, the head's first. Raises UserError before the first image is read,
    for what cannot work.
    """
    trained.encoder.require_size(config.size)
    require_one_batch(config.global_batch, num_images=len(labelled.split.train))
    bf16 = options.precision == "bf16"
    # With a frozen backbone that alone computes so, under an autocast of its own.
    with open_ranks(bf16=bf16 and config.protocol == "finetune") as accelerator:
        _check_ranks(config, accelerator.num_processes)
        work = _Work(config, trained, labelled, options, accelerator, say)
        for line in (*head, work.describe_place()):
            work.say(line)
        with stop_on_signals() as stop:
            results = work.run(stop)
        return ClassifierOutcome(
            results=results,
            stopped_by=stop.signal if work.stopped else None,
            world_size=accelerator.num_processes,
            is_main_process=accelerator.is_main_process,
        )


def _check_ranks(config: ClassifierConfig, world_size: int) -> None:
    if config.features != "none" and world_size > 1:
        raise UserError(
            f"--fast works in one process, not in {world_size} ranks: extraction is one pass over the "
            "images; start it without torchrun"
        )
    rank_batch, group = config.global_batch // world_size, config.bn_group
    if group is not None and rank_batch % group:
        raise UserError(
            f"bn_group={group} does not divide the {rank_batch} images of a rank (global_batch="
            f"{config.global_batch} on {world_size} rank{'s' if world_size > 1 else ''}); give a --bn-group "
            "that does, or another --global-batch"
        )


class _Work:
    """Everything that the trainings share."""

    def __init__(
        self,
        config: ClassifierConfig,
        trained: TrainedEncoder,
        labelled: LabelledSplit,
        options: RunOptions,
        accelerator: Accelerator,
        say: Say,
    ) -> None:
        self.config, self.trained, self.labelled = config, trained, labelled
        self.options, self.accelerator = options, accelerator
        # As the ranks agreed on it: their signals come at different moments.
        self.stopped = False
        self.say: Say = say if accelerator.is_main_process else lambda _: None
        self.device = "cpu" if accelerator.device.type == "cpu" else str(accelerator.device)

    def describe_place(self) -> str:
        """As `cpu, 2 ranks, fp32; in OUT`."""
        ranks = self.accelerator.num_processes
        place = f"{self.accelerator.device.type}, {ranks} rank{'s' if ranks > 1 else ''}"
        return f"{place}, {self.options.precision}; in {self.options.out}"

    def run(self, stop: StopRequest) -> list[dict[str, Any]]:
        results = []
        for name, encoder in self._encoders():
            xxh3 = weights_xxh3(encoder)
            runs = []
            for nth in range(self.options.num_runs):
                config = replace(self.config, seed=self.config.seed + nth)
                found = self._train(config, name, copy.deepcopy(encoder), xxh3, stop)
                if found is not None:
                    runs.append(found)
                if self.stopped:
                    break
            if runs:
                results.append({"name": name, **_summary(runs)})
            if self.stopped:
                break
        return results

    def _encoders(self) -> Iterator[tuple[str, Encoder]]:
        yield "trained", self.trained.encoder
        if not self.options.controls:
            return
        untrained = untrained_encoder(self.trained.config)
        if self.config.protocol == "linear":
            samples = self.labelled.split.train.first(CALIBRATION_IMAGES)
            images = open_evaluation(
                samples,
                size=self.config.size,
                backend=self.config.backend,
                num_threads=self.options.num_threads or default_num_threads(),
            )
            calibrate_bn(untrained, (part.images for part in images))
        yield "untrained", untrained

    def _train(
        self, config: ClassifierConfig, name: str, encoder: Encoder, xxh3: str, stop: StopRequest
    ) -> dict[str, Any] | None:
        """The last line of one training's log, with its seed and folder; None: it was stopped before one."""
        folder = ClassifierFolder(self.options.out / name / f"seed-{config.seed}")
        about = self._about(config, name, xxh3)
        # Before anything is extracted or opened, whoever's folder it is.
        folder.load(about)
        fc = new_fc(encoder.num_features, self.labelled.num_classes, seed=config.seed)
        module: nn.Module = fc
        backbone: FrozenBackbone | None = None
        if config.protocol == "finetune":
            module = FineTuned(encoder, fc, bn_group=config.bn_group)
        else:
            backbone = FrozenBackbone(encoder, device=self.device, precision=self.options.precision)
        train, test = self._batches(config, backbone, xxh3, stop)
        title = f"{name}, seed {config.seed}"
        total = config.epochs * train.steps_per_epoch
        try:
            with progress(title, total=total, unit="steps") as advance:
                training = ClassifierTraining(
                    config,
                    module,
                    backbone=None if config.features != "none" else backbone,
                    train=train,
                    test=test,
                    folder=folder,
                    about=about,
                    accelerator=self.accelerator,
                    watch=Watch(
                        eval_epochs=self.options.eval_epochs,
                        checkpoint_steps=self.options.checkpoint_steps,
                        on_epoch=lambda line: self.say(f"{title}: {epoch_line(line, epochs=config.epochs)}"),
                        advance=advance,
                    ),
                )
                if training.step:
                    self.say(f"{title}: continuing after step {training.step:,} of {total:,}")
                last = training.run(stop)
                self.stopped = training.stopped
        finally:
            train.close()
        if last is None:
            return None
        return {"seed": config.seed, "finished": training.finished, "folder": str(folder.root), **last}

    def _batches(
        self, config: ClassifierConfig, backbone: FrozenBackbone | None, xxh3: str, stop: StopRequest
    ) -> tuple[TrainBatches, TestBatches]:
        split, threads = self.labelled.split, self.options.num_threads
        if config.features != "none":
            assert backbone is not None, "the fast variant is a linear probe"
            num_images = split.train.catalog.num_samples + split.test.catalog.num_samples
            with progress("features", total=num_images, unit="images") as advance:

                def count(images: float) -> None:
                    advance(images)
                    if stop:  # what is extracted stays; there is no state of a training yet
                        raise KeyboardInterrupt

                train, test = open_cached_features(
                    split,
                    backbone,
                    weights_xxh3=f"{xxh3}-{self.options.precision}",
                    size=config.size,
                    backend=config.backend,
                    folder=self.options.out / "features",
                    device=self.device,
                    num_threads=threads,
                    advance=count,
                )
            backbone.require_unchanged()
            batches = open_feature_batches(config, split, train, device=self.device)
            return batches, feature_tests(test, device=self.device)
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        crops = open_crops(
            config, split.train, device=self.device, rank=rank, world_size=world_size, num_threads=threads
        )
        tests = centre_crops(
            config, split.test, device=self.device, rank=rank, world_size=world_size, num_threads=threads
        )
        return crops, tests

    def _about(self, config: ClassifierConfig, name: str, xxh3: str) -> dict[str, Any]:
        model = self.trained.config.model
        split = self.labelled.split
        return {
            "config": config.plain(),
            "precision": self.options.precision,
            "encoder": {"name": model.encoder, "weights": name, "weights_xxh3": xxh3},
            "train": {"num_images": len(split.train), "plan_id": _plan_id(split.train.catalog)},
            "test": {"num_images": len(split.test), "plan_id": _plan_id(split.test.catalog)},
            "num_classes": split.num_classes,
        }


def _plan_id(catalog: Catalog) -> str:
    return f"{catalog.plan_id}/{catalog.num_samples}"


def epoch_line(line: dict[str, Any], *, epochs: int) -> str:
    """One epoch in a line of at most 80 columns."""
    tested = (
        f" | test top-1 {100 * line['top1']:.1f}% top-5 {100 * line['top5']:.1f}%" if "top1" in line else ""
    )
    replaced = f" replaced {line['replaced']:,}" if line.get("replaced") else ""
    return (
        f"epoch {line['epoch']}/{epochs} lr {line['lr']:.3g} loss {line['loss']:.3f} "
        f"train {100 * line['train_top1']:.1f}%{tested}{replaced}"
    )


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the runs (of the sample; None for one run), and the runs."""
    found: dict[str, Any] = {}
    for name in ("top1", "top5"):
        values = [run[name] for run in runs]
        found[f"{name}_mean"] = statistics.fmean(values)
        found[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
    return {**found, "finished": all(run["finished"] for run in runs), "runs": runs}

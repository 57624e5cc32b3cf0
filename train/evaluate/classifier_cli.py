"""`linerate eval linear` and `linerate eval finetune`: words to settings, results to the screen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from linerate.pipeline.cache import CacheOptions, open_shards
from linerate.shards.errors import UserError
from linerate.shards.terminal import emit_json, parse_args, require_counts, stderr
from linerate.train.evaluate.classifier_recipes import (
    FINETUNE_RECIPES,
    LINEAR_RECIPES,
    ClassifierConfig,
    scaled_milestones,
)

if TYPE_CHECKING:
    from linerate.train.checkpoint import TrainedEncoder


@dataclass(frozen=True, kw_only=True)
class ClassifierCommand(CacheOptions):
    """What both protocols take. The same command again goes on where it was stopped or killed."""

    run: tyro.conf.Positional[Path]
    """Run folder, or one checkpoint of it."""
    train: str
    """Labelled shards to learn from: a folder or a URL (s3://, gs://, https://)."""
    test: str | None = None
    """Labelled shards that are judged; without them a share of --train is held out."""
    test_share: float = 0.1
    """Share of --train that is held out where there is no --test, by a hash of the sample's id."""
    label_share: float = 1.0
    """Share of the train labels that is used, as 0.01, by a hash of the sample's id; a class keeps one."""
    out: Path | None = None
    """Folder of states and results; None: in the run's folder, named by protocol, recipe and step."""
    runs: int = 1
    """Trainings of each encoder, with seeds that follow one another; mean and deviation are printed."""
    seed: int = 0
    """Of the first training: the classifier's weights, the order and the crops."""
    controls: bool = False
    """Also the same encoder before its first step."""
    epochs: int | None = None
    """None: the recipe's; its milestones move along."""
    milestones: tuple[int, ...] | None = None
    """Epochs from which the next x 0.1 holds; None: the recipe's, at the same shares of the epochs."""
    global_batch: int | None = None
    """Images of one step over all ranks; None: the recipe's. Another one needs --scale-lr or --lr."""
    lr: float | None = None
    """Learning rate at the start; None: the recipe's."""
    scale_lr: bool = False
    """With another --global-batch: scale the recipe's lr by batch / recipe's batch."""
    weight_decay: float | None = None
    """L2 penalty; None: the recipe's."""
    size: int | None = None
    """Side of the images, pixels; None: the one of training."""
    backend: Literal["dali", "torch"] = "dali"
    """What makes the crops of training and of the test; both make the same, to a grey level."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the backbone; auto: bf16 on a GPU, fp32 on a CPU."""
    eval_epochs: int = 1
    """Epochs between two tests; the last epoch has one in any case. No figure is chosen by them."""
    checkpoint_steps: int = 500
    """Steps between two states; one more is written at the end and on a signal."""
    threads: int | None = None
    """Threads that decode; None: this process's cores."""
    json: bool = False
    """One JSON object on stdout instead of a table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "runs", "epochs", "global_batch", "size", "threads")
        require_counts(self, "eval_epochs", "checkpoint_steps")
        if not 0 < self.label_share <= 1:
            raise UserError(f"--label-share {self.label_share:g} is no share; give a number above 0, as 0.01")
        if self.test is None and not 0 < self.test_share < 1:
            raise UserError(f"--test-share {self.test_share:g} must lie between 0 and 1, as 0.1")


@dataclass(frozen=True, kw_only=True)
class LinearCommand(ClassifierCommand):
    """Linear probe: a classifier on the frozen backbone's features, by the paper's protocol."""

    recipe: Literal["v1", "v3"] = "v1"
    """v1: batch 256, lr 30, 100 epochs, x 0.1 at 60 and 80; v3: batch 1024, lr 0.4, 90 epochs, cosine."""
    fast: bool = False
    """On features of centre crops that are extracted once: minutes, no augmentation, another figure."""


@dataclass(frozen=True, kw_only=True)
class FinetuneCommand(ClassifierCommand):
    """Fine-tuning: the whole network learns the classes, from the encoder's weights on."""

    recipe: Literal["in1m", "inat18"] = "in1m"
    """in1m: lr 0.03; inat18: lr 0.025; both 100 epochs at batch 256."""
    bn_group: int | None = None
    """Images that share BN statistics, on however many ranks; None: the recipe's 32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "bn_group")


def main_linear(argv: list[str]) -> int:
    """`linerate eval linear RUN --train SHARDS [--test SHARDS] [--fast]`."""
    command = parse_args(LinearCommand, argv, prog="linerate eval linear")
    recipe = LINEAR_RECIPES[command.recipe]()
    return _run(command, replace(recipe, features="centre-crop" if command.fast else "none"))


def main_finetune(argv: list[str]) -> int:
    """`linerate eval finetune RUN --train SHARDS [--test SHARDS] [--label-share 0.01]`."""
    command = parse_args(FinetuneCommand, argv, prog="linerate eval finetune")
    recipe = FINETUNE_RECIPES[command.recipe]()
    return _run(command, replace(recipe, bn_group=command.bn_group or recipe.bn_group))


def _run(command: ClassifierCommand, recipe: ClassifierConfig) -> int:
    import torch

    from linerate.train.checkpoint import load_trained
    from linerate.train.evaluate.classifier_run import FAST, RunOptions, run_classifiers
    from linerate.train.evaluate.labelled import open_labelled_split
    from linerate.train.plan import require_one_batch
    from linerate.train.stop import exit_code

    trained = load_trained(command.run)
    labelled = open_labelled_split(
        open_shards(command.train, command),
        open_shards(command.test, command) if command.test else None,
        test_share=command.test_share,
        label_share=command.label_share,
    )
    # No learning rate helps a batch that the images do not fill.
    require_one_batch(command.global_batch or recipe.global_batch, num_images=len(labelled.split.train))
    config = configure(command, recipe, size=trained.config.views.size)
    precision = command.precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() else "fp32"
    options = RunOptions(
        out=command.out or default_out(trained, config),
        num_runs=command.runs,
        controls=command.controls,
        precision=precision,
        num_threads=command.threads,
        eval_epochs=command.eval_epochs,
        checkpoint_steps=command.checkpoint_steps,
    )
    told = {
        "run": str(command.run),
        "checkpoint": str(trained.path),
        "step": trained.step,
        "protocol": config.protocol,
        "variant": FAST if config.features != "none" else "full",
        "config": config.plain(),
        "num_train": len(labelled.split.train),
        "num_test": len(labelled.split.test),
        "num_test_in_train": labelled.num_test_in_train,
        "num_classes": labelled.num_classes,
        "notes": [*labelled.notes],
        "out": str(options.out),
    }
    head = [*head_lines(told, recipe), *(f"note: {note}" for note in labelled.notes)]
    outcome = run_classifiers(config, trained, labelled, options, head=head, say=_say)
    if outcome.is_main_process:
        result = {**told, "world_size": outcome.world_size, "results": outcome.results}
        _show(result, as_json=command.json)
        if outcome.stopped_by is not None:
            _say("stopped; the same command goes on from here")
    return exit_code(outcome.stopped_by)


def configure(command: ClassifierCommand, recipe: ClassifierConfig, *, size: int) -> ClassifierConfig:
    """The recipe with what the command says instead, and an lr that was decided on for its batch.

    size: the one of training. Raises UserError for another batch without a decision.
    """
    from linerate.train.recipes import decided_lr

    batch, epochs = command.global_batch or recipe.global_batch, command.epochs or recipe.epochs
    milestones = command.milestones
    lr = decided_lr(
        command.lr,
        batch=batch,
        recipe=f"{recipe.protocol} {recipe.recipe}",
        recipe_lr=recipe.lr,
        recipe_batch=recipe.global_batch,
        scale_lr=command.scale_lr,
    )
    return replace(
        recipe,
        seed=command.seed,
        size=command.size or size,
        backend=command.backend,
        global_batch=batch,
        lr=lr,
        weight_decay=recipe.weight_decay if command.weight_decay is None else command.weight_decay,
        epochs=epochs,
        milestones=scaled_milestones(recipe, epochs) if milestones is None else milestones,
        label_share=command.label_share,
        test_share=None if command.test else command.test_share,
    )


def default_out(trained: TrainedEncoder, config: ClassifierConfig) -> Path:
    """RUN/linear/v1-step-000001500: beside the checkpoints that it is of."""
    folder = trained.path.parent
    root = folder.parent if folder.name == "checkpoints" else folder
    words = [config.recipe, *(["fast"] if config.features != "none" else []), trained.path.stem]
    if config.label_share < 1:
        words.append(f"labels-{config.label_share:g}")
    return root / config.protocol / "-".join(words)


def head_lines(told: dict[str, Any], recipe: ClassifierConfig) -> list[str]:
    """What is about to happen: the numbers that decide it, the learning rate among them."""
    config = told["config"]
    lr = f"lr {config['lr']:g}"
    if (config["lr"], config["global_batch"]) != (recipe.lr, recipe.global_batch):
        lr += f" (the recipe's is {recipe.lr:g} at batch {recipe.global_batch})"
    course = "cosine" if config["decay"] == "cosine" else f"x 0.1 at epochs {config['milestones']}"
    lines = [
        f"{config['protocol']}, recipe {config['recipe']}: {config['epochs']} epochs, batch "
        f"{config['global_batch']}, {lr}, {course}; {told['num_train']:,} train and {told['num_test']:,} "
        f"test images of {told['num_classes']:,} classes at {config['size']} px"
    ]
    return lines if told["variant"] == "full" else [told["variant"], *lines]


def _say(line: str) -> None:
    stderr.print(line, soft_wrap=True, highlight=False, markup=False)


def _show(result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        emit_json(result)
        return
    config = result["config"]
    title = f"{config['protocol']}, recipe {config['recipe']}, step {result['step']:,}"
    if result["variant"] != "full":
        title += f"\n{result['variant']}"
    num = result["num_test"]
    table = Table(
        "encoder", "runs", f"top-1 of {num:,}", f"top-5 of {num:,}", title=title, title_justify="left"
    )
    for row in result["results"]:
        name = row["name"] if row["finished"] else f"{row['name']} (not finished)"
        table.add_row(name, str(len(row["runs"])), _percent(row, "top1"), _percent(row, "top5"))
    Console().print(table)


def _percent(row: dict[str, Any], name: str) -> str:
    deviation = row[f"{name}_std"]
    shown = f"{100 * row[f'{name}_mean']:.1f}"
    return f"{shown} %" if deviation is None else f"{shown} +- {100 * deviation:.1f} %"

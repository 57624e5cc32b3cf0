"""`linerate train` and `linerate eval`: words to configs, results to the screen."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro
from rich.console import Console
from rich.table import Table

from linerate.pipeline.cache import CacheOptions, open_shards
from linerate.shards.errors import UserError
from linerate.shards.terminal import dispatch, emit_json, parse_args, stderr
from linerate.train.config import TrainConfig
from linerate.train.evaluate.classifier_cli import main_finetune, main_linear
from linerate.train.evaluate.cli import main_knn
from linerate.train.evaluate.detect.cli import main_detect
from linerate.train.plan import require_one_batch
from linerate.train.recipes import RECIPES, decide_lr, find_recipe
from linerate.train.speed_profile import load_profile
from linerate.train.stop import exit_code

if TYPE_CHECKING:
    from linerate.train.run_folder import Damage


@dataclass(frozen=True, kw_only=True)
class ConfigFlags(TrainConfig):
    """TrainConfig as flags; the recipe is the command's first word instead."""

    recipe: tyro.conf.Suppress[str]


@dataclass(frozen=True, kw_only=True)
class RecipeCommand(CacheOptions):
    """A command whose first word is a recipe."""

    shards: str | None = None
    """Folder that `linerate shard pack` made, or its URL (s3://, gs://, https://)."""
    scale_lr: bool = False
    """With another --global-batch: scale the recipe's lr by batch / recipe's batch."""
    json: bool = False
    """One JSON object on stdout instead of a table."""
    config: ConfigFlags


RecipeCommandT = TypeVar("RecipeCommandT", bound=RecipeCommand)


@dataclass(frozen=True, kw_only=True)
class TrainCommand(RecipeCommand):
    """Pretrain an encoder with MoCo by a recipe; every flag below changes one of its fields."""

    # Under torchrun only the long name works: it takes --run for a beginning of its own --run-path.
    run: Annotated[Path | None, tyro.conf.arg(aliases=["--run-dir"])] = None
    """Folder for log, checkpoints and config; under torchrun write --run-dir."""
    resume: bool = False
    """Continue from the newest whole checkpoint in --run; start anew where there is none."""
    dry_run: bool = False
    """Print the plan (steps, what is dropped, shards of a rank, learning rates, memory) and stop."""
    ranks: int | None = None
    """For --dry-run: the processes that the run would have; None: those that started this command."""
    profile: Path | None = None
    """Switches that `linerate tune` found; flags given beside it count more. A trace of where the time goes
    is another thing: `linerate bench pipeline RECIPE --profile FOLDER`."""


def main_train(argv: list[str]) -> int:
    """`linerate train RECIPE --shards OUT --run DIR [--resume] [--dry-run] [flags of the recipe]`."""
    if not argv or argv[0] in ("-h", "--help"):
        _print_recipes("linerate train", "--shards FOLDER --run FOLDER [--resume] [--dry-run]")
        return 0
    command, config = parse_train(argv)
    if command.ranks is not None and not command.dry_run:
        raise UserError(
            f"--ranks {command.ranks} is for --dry-run; torchrun --nproc-per-node {command.ranks} starts them"
        )
    if command.dry_run:
        from linerate.train.dry_run import dry_run

        return dry_run(
            config,
            recipe=find_recipe(argv[0]),
            shards=command.shards,
            cache=command,
            world_size=_world_size(command),
            json=command.json,
        )
    if command.shards is None or command.run is None:
        missing = "--shards" if command.shards is None else "--run"
        raise UserError(f"{missing} is missing: linerate train {argv[0]} --shards FOLDER --run FOLDER")
    return _train(command, config, shards=command.shards, run=command.run)


def parse_train(argv: list[str]) -> tuple[TrainCommand, TrainConfig]:
    """The command and the config of `linerate train` argv, with the decision about lr made.

    Shards that are named must be there and fill a batch: no learning rate helps one that is too large.
    """
    command, config = parse_recipe(TrainCommand, argv, prog="linerate train")
    say_what_was_tuned_for(command.profile, config, world_size=_world_size(command))
    return command, config


def say_what_was_tuned_for(
    profile: Path | None, config: TrainConfig, *, world_size: int | None = None
) -> None:
    """On stderr, where a profile that was read was made for another run or machine than this one.

    For commands that train or measure by themselves; a cell of a sweep is such a command and knows its ranks.
    world_size: ranks of the run; None: those that the launcher started.
    """
    if profile is None or int(os.environ.get("RANK", "0")):
        return
    for note in load_profile(profile).notes(config, world_size=world_size):
        stderr.print(f"note: {note}", highlight=False, markup=False)


def parse_recipe(
    kind: type[RecipeCommandT],
    argv: list[str],
    *,
    prog: str,
    usage: str = "--shards FOLDER --out PATH",
    tuned: str = "--profile",
) -> tuple[RecipeCommandT, TrainConfig]:
    """A command whose first word is a recipe and whose flags are the recipe's fields, and its config.

    tuned: the flag that names a file of `linerate tune`. It stands for flags before all others, so that the
    later ones count more. Raises UserError where shards that are named do not fill a batch, or another batch
    comes without a decision about lr.
    """
    if argv and argv[0] in ("-h", "--help"):
        _print_recipes(prog, usage)
        raise SystemExit(0)
    if not argv or argv[0].startswith("-"):
        raise UserError(
            f"the recipe comes first, as in `{prog} {next(iter(RECIPES))} {' '.join(argv[:1])} ...`"
        )
    recipe = find_recipe(argv[0]).build()
    words = argv[1:]
    if (profile := _value_of(tuned, words)) is not None:
        words = [*load_profile(Path(profile), flag=tuned).flags(), *words]
    words = _one_length(_with_values(_shuffled(words)))
    default: Any = {"config": ConfigFlags(**_fields(recipe))}
    command = parse_args(kind, words, prog=f"{prog} {argv[0]}", default=kind(**default))
    config = TrainConfig(**_fields(command.config))
    # Not a rule of ShuffleBN: checkpoints that were written with both stay good.
    if is_given("--shuffle-block", words) and not config.bn.shuffle:
        raise UserError(
            f"--shuffle-block {config.bn.shuffle_block} says among which images keys change places, and "
            "without shuffling they keep theirs: give one of --shuffle-block and --no-shuffle"
        )
    if command.shards is not None:
        num_images = open_shards(command.shards, command).num_samples
        require_one_batch(config.optim.global_batch, num_images=num_images)
    lr_given = is_given("--lr", words)
    return command, decide_lr(config, recipe=recipe, lr_given=lr_given, scale_lr=command.scale_lr)


def _shuffled(words: list[str]) -> list[str]:
    """The words, with the sweep's `--shuffle-bn on` and `off` as `--shuffle` and `--no-shuffle`."""
    found: list[str] = []
    left = iter(words)
    for word in left:
        flag, equals, value = word.partition("=")
        if flag != "--shuffle-bn":
            found.append(word)
            continue
        value = value if equals else next(left, "")
        if value not in ("on", "off"):
            told = f"--shuffle-bn {value} is neither on nor off" if value else "--shuffle-bn wants on or off"
            raise UserError(f"{told}; off is the ablation, as --no-shuffle")
        found.append("--shuffle" if value == "on" else "--no-shuffle")
    return found


def _with_values(words: list[str]) -> list[str]:
    """The words, with the value that `--compile` once had no need of."""
    found = []
    for word, after in zip(words, [*words[1:], None], strict=False):
        if word == "--compile" and (after is None or after.startswith("-")):
            found += [word, "encoders"]
        else:
            found += ["--compile", "off"] if word == "--no-compile" else [word]
    return found


def _one_length(words: list[str]) -> list[str]:
    """The words, with the recipe's own length switched off where they give one in the other unit."""
    for given, other in (("--epochs", "--iterations"), ("--iterations", "--epochs")):
        if is_given(given, words) and not is_given(other, words):
            return [*words, other, "None"]
    return words


def is_given(flag: str, words: list[str]) -> bool:
    """Whether the words name the flag, as `--lr 0.1` or `--lr=0.1`."""
    return any(word == flag or word.startswith(f"{flag}=") for word in words)


def _value_of(flag: str, words: list[str]) -> str | None:
    """The word after the last `flag`, or behind its `=`; None: it is not given, or has no value."""
    value = None
    for word, after in pairwise([*words, "--"]):
        if word == flag and not after.startswith("--"):
            value = after
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value


def _fields(config: TrainConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}


def _print_recipes(prog: str, usage: str) -> None:
    console = Console()
    console.print(f"usage: {prog} RECIPE {usage} ...\n", markup=False)
    table = Table(box=None, show_header=False)
    for name, recipe in RECIPES.items():
        table.add_row(f"[bold cyan]{name}[/]", recipe.title)
    console.print(table)
    console.print(f"\n`{prog} RECIPE --help` lists the flags with the recipe's values.")


def _world_size(command: TrainCommand) -> int:
    if command.ranks is None:
        return int(os.environ.get("WORLD_SIZE", "1"))
    if command.ranks < 1:
        raise UserError(f"--ranks {command.ranks} is no number of processes; give 1 or more")
    return command.ranks


def _train(command: TrainCommand, config: TrainConfig, *, shards: str, run: Path) -> int:
    from linerate.train.display import show_run
    from linerate.train.pretrain import pretrain

    if int(os.environ.get("RANK", "0")):
        pretrain(config, shards=shards, cache=command, run_dir=run, resume=command.resume)
        return 0
    with show_run(f"{config.recipe} in {run}") as on_event:
        summary = pretrain(
            config, shards=shards, cache=command, run_dir=run, resume=command.resume, on_event=on_event
        )
    result = {"run": str(run), "finished": summary.finished, **dataclasses.asdict(summary)}
    if command.json:
        emit_json(result)
    else:
        table = Table(title=f"{config.recipe} in {run}", title_justify="left", show_header=False)
        for name, value in [*result.items(), *damage_rows(summary.damage, logs=summary.bad_sample_logs)]:
            if value not in (None, ()) and name not in ("damage", "bad_sample_logs"):
                told = ", ".join(value) if isinstance(value, tuple) else value
                table.add_row(name, f"{told:.4g}" if isinstance(told, float) else str(told))
        Console().print(table)
    if summary.stopped_by is not None:
        show = f"stopped by {summary.stopped_by} after step {summary.step:,}; --resume continues"
        Console(stderr=True).print(show, highlight=False)
    return exit_code(signal.Signals[summary.stopped_by]) if summary.stopped_by else 0


def damage_rows(damage: Sequence[Damage], *, logs: Sequence[str], limit: int = 8) -> list[tuple[str, str]]:
    """What was bad, by shard and reason, of many the first; and where every sample is named."""
    rows = []
    for one in damage[:limit]:
        what = "the whole shard" if one.num_samples is None else f"{one.num_samples:,} of its samples"
        rows.append((one.shard, f"{what}: {one.reason}"))
    if len(damage) > limit:
        rows.append(("...", f"{len(damage) - limit} more; --json has all"))
    return [*rows, *(("listed in", path) for path in logs)]


def main_eval(argv: list[str]) -> int:
    """`linerate eval knn|linear|finetune|detect RUN ...`."""
    commands = {
        "knn": (main_knn, "k nearest neighbours among labelled images vote for the class"),
        "linear": (main_linear, "a linear classifier on the frozen backbone's features"),
        "finetune": (main_finetune, "the whole network learns the classes from the encoder's weights on"),
        "detect": (main_detect, "fine-tune on boxes, masks, keypoints or segments of VOC and COCO; AP, mIoU"),
    }
    return dispatch(commands, argv, prog="linerate eval")

"""`linerate demo`: the whole way in minutes, from images to a trained, evaluated, measured encoder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.terminal import emit_json, parse_args, progress, stderr

if TYPE_CHECKING:
    from linerate.train.config import TrainConfig
    from linerate.train.pretrain import Summary

NUM_DRAWN = 4800
NUM_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Images -> shards -> two views -> MoCo -> kNN -> report.html, within minutes on two CPU cores.

    Without --images it draws its own labelled images. The same command again continues or shows the result.
    """

    images: Path | None = None
    """A folder of class folders, or a tar of one; one image in six of each class is for testing."""
    per_class: int | None = None
    """Take only so many images of each class, the first by name."""
    out: Path = Path("demo")
    """Folder for images, shards, the run and report.html."""
    seed: int = 0
    """Of the images drawn, the encoder, the order and the views."""
    iterations: int | None = None
    """Steps of MoCo; by default those of the recipe `demo`."""
    num_images: int = NUM_DRAWN
    """Images to draw, where --images names none."""
    measure_s: float = 20.0
    """About how long throughput is measured, seconds."""
    json: bool = False
    """One JSON object on stdout instead of a table."""

    def __post_init__(self) -> None:
        if self.num_images < 600:
            raise UserError(
                f"--num-images {self.num_images} is too few for shards of whole batches; give 600"
            )
        if self.per_class is not None and self.per_class < 2:
            raise UserError(f"--per-class {self.per_class} leaves none to train on; give 2 or more")

    def identity(self) -> dict[str, Any]:
        """What decides the result, as it is stored beside it."""
        images = str(self.images.absolute()) if self.images else None
        given = {
            "images": images,
            "per_class": self.per_class,
            "seed": self.seed,
            "iterations": self.iterations,
        }
        return given if self.images else {**given, "num_images": self.num_images}


def main(argv: list[str]) -> int:
    """`linerate demo [--images DIR|X.tar] [--out DIR] [--json]`."""
    options = parse_args(DemoOptions, argv, prog="linerate demo")
    command = shlex.join(["linerate", "demo", *argv])
    result = run_demo(options, command=command)
    if options.json:
        emit_json(result)
    else:
        _print_result(result)
    return 0


def run_demo(options: DemoOptions, *, command: str = "linerate demo") -> dict[str, Any]:
    """Every stage in turn; the result as `--json` prints it. Leaves report.html and result.json in OUT."""
    from linerate.bench.machine import machine
    from linerate.bench.suites.pipeline import measure_pipeline

    _claim(options)
    clock = _Clock()
    with clock.stage("images and shards"):
        train, test = _pack_parts(options)
    config = demo_config(options, num_train=train.num_samples, test=test.root)
    with clock.stage("pretraining"):
        summary = _pretrain(options, train, config)
    with clock.stage("kNN and controls"):
        knn = judge(options.out / "run", train, test)
    with clock.stage("throughput"):
        throughput = [
            record.to_json() for record in measure_pipeline(config, train, budget_s=options.measure_s)
        ]
    with clock.stage("report"):
        result = {
            "command": command,
            "images": _describe_images(options, train, test),
            "recipe": f"{config.recipe}: {config.model.encoder}, views {config.views.augmentation} of "
            f"{config.views.size} px, K = {config.dictionary.num_keys:,}, batch {config.optim.global_batch}",
            "chance_loss": config.chance_loss,
            "train": dataclasses.asdict(summary),
            "knn": knn,
            "throughput": throughput,
            "machine": machine(),
            "seconds": clock.seconds,
            "report": str(options.out / "report.html"),
        }
        _write_report(options, result, train, config)
    return result


class _Clock:
    """Wall time of each stage, said when it ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        stderr.print(f"[green]done[/] {name} [dim]{self.seconds[name]:.1f} s[/]", highlight=False)


def _claim(options: DemoOptions) -> None:
    """Take OUT for these options. Raises UserError where it holds something else."""
    mark = options.out / "demo.json"
    identity = options.identity()
    if mark.exists():
        stored = _load_mark(mark)
        differ = [f"{k} was {stored.get(k)}, now {v}" for k, v in identity.items() if stored.get(k) != v]
        if differ:
            raise UserError(
                f"{options.out} holds a demo with other options ({'; '.join(differ)}); name another --out"
            )
        return
    if options.out.is_dir() and any(path.name != ".demo.json" for path in options.out.iterdir()):
        raise UserError(f"{options.out} holds something that is no demo; name another --out")
    options.out.mkdir(parents=True, exist_ok=True)
    # Renamed into place: a kill may leave no mark, never half of one.
    temporary = options.out / ".demo.json"
    temporary.write_text(json.dumps(identity), encoding="utf-8")
    temporary.replace(mark)


def _load_mark(mark: Path) -> dict[str, Any]:
    """The options of the demo that OUT was begun with. Raises UserError where they cannot be read."""
    try:
        return dict(json.loads(mark.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(
            f"{mark} is damaged, so the options that {mark.parent} was begun with are not known; "
            f"name another --out, or remove {mark.parent} to start anew"
        ) from None


def _pack_parts(options: DemoOptions) -> tuple[Catalog, Catalog]:
    from linerate.bench.demo_images import write_images
    from linerate.bench.demo_source import SourcePart
    from linerate.shards.options import PackOptions
    from linerate.shards.pack import Effort, pack_source
    from linerate.shards.sources import open_source

    folder = options.images or options.out / "images"
    drawn = options.out / ".drawn"
    if options.images is None and not drawn.exists():
        with progress("drawing images", total=options.num_images, unit="images") as advance:
            write_images(folder, num_images=options.num_images, seed=options.seed, on_progress=advance)
        drawn.touch()
    source = open_source([folder])
    train, test = (SourcePart(source, part, options.per_class) for part in ("train", "test"))
    if next(test.rows(), None) is None:
        raise UserError(
            f"{folder} has no class folder with two images or more: the demo judges by labels; "
            f"`linerate shard pack` and `linerate train` work without"
        )
    catalogs = []
    for part in (train, test):
        with progress(f"packing {part.part} shards", total=None, unit="images") as advance:
            catalogs.append(
                pack_source(
                    part,
                    options.out / f"shards-{part.part}",
                    options=PackOptions(name=part.part, seed=options.seed, check="decode"),
                    effort=Effort(
                        on_progress=lambda stage, amount: advance(amount) if stage == "pack" else None
                    ),
                )
            )
    return catalogs[0], catalogs[1]


def demo_config(options: DemoOptions, *, num_train: int, test: Path) -> TrainConfig:
    """The recipe `demo` with this seed and length, judged about eight times on the test shards."""
    from linerate.train.recipes import find_recipe

    config = find_recipe("demo").build()
    schedule = dataclasses.replace(
        config.schedule, iterations=options.iterations or config.schedule.iterations, epochs=None
    )
    steps_per_epoch = num_train // config.optim.global_batch
    if not steps_per_epoch:
        raise UserError(
            f"{num_train} images to train on are less than one batch of {config.optim.global_batch}; "
            f"give more images"
        )
    knn_epochs = max(1, round((schedule.iterations or 0) / steps_per_epoch / 8))
    watch = dataclasses.replace(config.watch, knn_epochs=knn_epochs, knn_test=str(test))
    return dataclasses.replace(config, seed=options.seed, schedule=schedule, watch=watch)


def _pretrain(options: DemoOptions, train: Catalog, config: TrainConfig) -> Summary:
    from linerate.train.display import show_run
    from linerate.train.pretrain import pretrain

    run = options.out / "run"
    with show_run(f"demo in {run}") as on_event:
        summary = pretrain(config, shards=train.root, run_dir=run, resume=True, on_event=on_event)
    if summary.stopped_by:
        raise KeyboardInterrupt
    return summary


def judge(run: Path, train: Catalog, test: Catalog) -> dict[str, Any]:
    """kNN top-1 in [0, 1] of the trained encoder, the untrained one and raw pixels, on the same split."""
    import torch

    from linerate.train.checkpoint import load_trained
    from linerate.train.evaluate.features import open_split
    from linerate.train.evaluate.judge import KnnOptions, contestants, judge_by_knn

    trained, split = load_trained(run), open_split(train, test)
    options = KnnOptions(
        size=trained.config.views.size, device="cuda" if torch.cuda.is_available() else "cpu"
    )
    named = contestants(trained, split, options, features=trained.config.watch.knn_features)
    found = {}
    total = len(named) * (len(split.train) + len(split.test))
    with progress("judging", total=total, unit="images") as advance:
        for name, encode in zip(("trained", "untrained", "raw_pixels"), named.values(), strict=True):
            found[name] = judge_by_knn(encode, split, options, advance=advance)
    return {
        **{name: judged["knn_top1"] for name, judged in found.items()},
        "k": options.k,
        "temperature": options.temperature,
        "num_train": len(split.train),
        "num_test": len(split.test),
        "num_classes": split.num_classes,
    }


def _describe_images(options: DemoOptions, train: Catalog, test: Catalog) -> dict[str, Any]:
    return {
        "name": options.images.name if options.images else "images drawn by the project",
        "num_train": train.num_samples,
        "num_test": test.num_samples,
        "num_rejected": train.num_rejected + test.num_rejected,
        "class_names": list(train.class_names),
    }


def _write_report(options: DemoOptions, result: dict[str, Any], train: Catalog, config: TrainConfig) -> None:
    from linerate.bench.demo_page import write_page
    from linerate.pipeline.preview import see_samples
    from linerate.train.run_folder import RunFolder

    positions = range(0, train.num_samples, max(1, train.num_samples // NUM_SHOWN))[:NUM_SHOWN]
    seen = see_samples(
        train,
        positions,
        recipe=config.views.recipe(),
        backend=config.views.backend,
        seed=config.seed,
        epochs=range(1),
    )
    run = RunFolder(options.out / "run")
    log = [event for kind in ("step", "knn") for event in run.load_log(kind)]
    (options.out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    write_page(options.out / "report.html", result=result, seen=seen, log=log)


def throughput_rows(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Loader, step and both, as people read them. records: those of measure_pipeline."""
    rows = []
    for record in records:
        stage, _, _ = record["work"].partition(":")
        share = f", {record['ratio']:.2f} of the step alone" if record["ratio"] is not None else ""
        rows.append((stage, f"{record['ours']:,.0f} {record['unit']}{share}"))
    return rows


def _print_result(result: dict[str, Any]) -> None:
    table = Table(title="linerate demo", title_justify="left", show_header=False)
    images, knn, train = result["images"], result["knn"], result["train"]
    table.add_row("images", f"{images['num_train']:,} to train on, {images['num_test']:,} to judge by")
    if images["num_rejected"]:
        table.add_row("rejected", f"{images['num_rejected']:,}, see rejected.parquet beside the shards")
    if train["loss"] is not None:
        chance = f"{result['chance_loss']:.2f} is chance"
        table.add_row("loss", f"{train['loss']:.2f} after {train['step']:,} steps ({chance})")
    table.add_row("kNN, trained", f"[bold]{100 * knn['trained']:.1f} %[/]")
    table.add_row("kNN, untrained", f"{100 * knn['untrained']:.1f} %")
    table.add_row("kNN, raw pixels", f"{100 * knn['raw_pixels']:.1f} %")
    for name, value in throughput_rows(result["throughput"]):
        table.add_row(name, value)
    table.add_row("time", f"{sum(result['seconds'].values()):.0f} s")
    table.add_row("report", result["report"])
    Console().print(table)

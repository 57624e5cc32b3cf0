"""`linerate eval detect`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from linerate.shards.errors import UserError
from linerate.shards.terminal import emit_json, parse_args, progress, stderr
from linerate.train.evaluate.detect.settings import DetectCommand

if TYPE_CHECKING:
    from collections.abc import Callable

    from timm.models.resnet import ResNet

    from linerate.train.checkpoint import TrainedEncoder
    from linerate.train.evaluate.detect.annotations import Findings
    from linerate.train.evaluate.detect.job import Job
    from linerate.train.evaluate.detect.loop import LoopOptions

# What may be given anew for a run that goes on, since it changes no result.
_FREE = ("run", "out", "json", "workers", "checkpoint_iterations", "log_iterations", "runs")


def main_detect(argv: list[str]) -> int:
    """`linerate eval detect RUN --data DIR --format voc|coco --out OUT ...`."""
    command = parse_args(DetectCommand, argv, prog="linerate eval detect")
    result = run_detect(command)
    if result is None:
        return 0
    if command.json:
        emit_json(result)
        return 0
    several = result["std"] is not None
    title = f"{result['network']}, init {command.init}, {result['iterations']:,} iterations"
    table = Table("", "mean" if several else "", title=title, title_justify="left")
    if several:
        table.add_column(f"std of {command.runs} runs")
    for name, value in result["mean"].items():
        told = "no objects" if value is None else f"{value:.2f}"
        table.add_row(name.replace("_", " "), told, *([f"{result['std'][name] or 0:.2f}"] if several else []))
    Console().print(table)
    return 0


def run_detect(command: DetectCommand) -> dict[str, Any] | None:
    """What the command prints, also written to OUT/result.json; None on the ranks beside the first.

    Raises UserError before the first iteration where data, flags or the folder do not fit.
    """
    from linerate.train.checkpoint import load_trained
    from linerate.train.evaluate.detect.coco_layout import require_pycocotools
    from linerate.train.evaluate.detect.loop import open_ranks, run_job
    from linerate.train.evaluate.detect.transfer_folder import TransferFolder, write_whole

    if command.format == "coco":
        require_pycocotools()
    trained = load_trained(command.run)
    job, about, findings = _open_job(command, trained)
    loop = _loop_options(command)
    settings = {
        **{name: value for name, value in dataclasses.asdict(command).items() if name not in _FREE},
        "checkpoint": trained.path.name,
        "encoder": trained.config.model.encoder,
        **about,
    }
    accelerator = open_ranks()
    folder = TransferFolder(command.out)
    if accelerator.is_main_process:
        folder.open(settings)
        for line in [*_told_data(job, findings), _told_schedule(loop, about["network"])]:
            stderr.print(line, highlight=False, markup=False, soft_wrap=True)
    accelerator.wait_for_everyone()
    runs = []
    for number in range(command.runs):
        one = dataclasses.replace(loop, seed=command.seed + number)
        total = loop.schedule.iterations
        with (
            progress(f"run {number}", total=total, unit="it")
            if accelerator.is_main_process
            else contextlib.nullcontext(lambda _: None)
        ) as advance:
            runs.append(
                run_job(job, one, folder=folder.run(number), accelerator=accelerator, advance=advance)
            )
    if not accelerator.is_main_process:
        return None
    result = {
        **{
            "run": str(command.run),
            "checkpoint": str(trained.path),
            "step": trained.step,
            "init": command.init,
        },
        **about,
        **_loop_result(loop),
        "findings": {part: dict(found.counts) for part, found in findings.items()},
        "runs": runs,
        **_summary(runs),
    }
    write_whole(command.out / "result.json", json.dumps(result, indent=1).encode())
    return result


def _loop_options(command: DetectCommand) -> LoopOptions:
    from linerate.train.evaluate.detect.loop import LoopOptions
    from linerate.train.evaluate.detect.schedules import ScheduleName, scale_schedule

    name: ScheduleName = command.schedule or ("24k" if command.format == "voc" else "2x")
    if command.task == "segmentation":
        name = "30k"
    import torch

    return LoopOptions(
        schedule=scale_schedule(name, batch=command.batch, iterations=command.iterations, lr=command.lr),
        batch=command.batch,
        seed=command.seed,
        precise_bn=command.precise_bn,
        checkpoint_iterations=command.checkpoint_iterations,
        log_iterations=command.log_iterations,
        workers=command.workers if command.workers is not None else 4 * torch.cuda.is_available(),
    )


def _open_job(
    command: DetectCommand, trained: TrainedEncoder
) -> tuple[Job, dict[str, Any], dict[str, Findings]]:
    """The job, what the result says of it, and what was found in the data."""
    from linerate.train.evaluate.detect.backbones import initial_backbone

    def backbone(seed: int) -> ResNet:
        return initial_backbone(trained, command.init, seed=seed)

    backbone(command.seed)  # an encoder or a file that does not fit is told of before any data is read
    return (_segmentation if command.task == "segmentation" else _detection)(command, backbone)


def _segmentation(
    command: DetectCommand, backbone: Callable[[int], ResNet]
) -> tuple[Job, dict[str, Any], dict[str, Findings]]:
    from linerate.train.evaluate.detect.annotations import count_doubles
    from linerate.train.evaluate.detect.segmentation import read_masks, segmentation_job

    train_set, test_set = command.splits()
    train = read_masks(command.data, train_set, num_classes=command.num_classes)
    test = read_masks([_test_root(command)], test_set, num_classes=command.num_classes)
    count_doubles([path for path, _ in train.pairs], [path for path, _ in test.pairs], test.findings)
    job = segmentation_job(train, test, backbone=backbone, num_classes=command.num_classes, crop=command.crop)
    about = {"network": "fcn-16s", "metric": "mIoU", **_sizes(job)}
    return job, about, {"train": train.findings, "test": test.findings}


def _detection(
    command: DetectCommand, backbone: Callable[[int], ResNet]
) -> tuple[Job, dict[str, Any], dict[str, Findings]]:
    from linerate.train.evaluate.detect.annotations import count_doubles
    from linerate.train.evaluate.detect.coco_layout import read_coco
    from linerate.train.evaluate.detect.detection import detection_job
    from linerate.train.evaluate.detect.networks import DetectorOptions
    from linerate.train.evaluate.detect.voc_layout import read_voc

    train_set, test_set = command.splits()
    if command.format == "voc":
        train = read_voc(command.data, train_set, class_names=command.classes)
        test = read_voc([_test_root(command)], test_set, class_names=train.class_names)
        kind = _voc_ap(command)
    else:
        points = command.task == "keypoints"
        train = read_coco(command.data[0], train_set, keypoints=points)
        test = read_coco(_test_root(command), test_set, keypoints=points)
        kind = None
        if (train.category_ids, train.keypoint_names) != (test.category_ids, test.keypoint_names):
            raise UserError(
                f"{train_set} and {test_set} have different categories; give two splits of one data set"
            )
    count_doubles(
        [image.path for image in train.images], [image.path for image in test.images], test.findings
    )
    network = command.network or ("fpn" if command.task == "keypoints" else "c4")
    sides = command.train_sides()
    options = DetectorOptions(
        network=network,
        num_classes=len(train.class_names),
        masks=command.masks(),
        num_keypoints=len(train.keypoint_names),
        train_sides=sides,
        test_side=command.test_side or sides[-1],
        max_side=command.max_side,
        rois=command.rois,
        proposals=command.proposals,
    )
    job = detection_job(train, test, backbone=backbone, options=options, voc_ap=kind)
    if not len(job.train):
        raise UserError(
            f"no image of {train_set} has an object to train on: {'; '.join(train.findings.lines())}; "
            "name another split"
        )
    metric = f"VOC, {kind}" if kind else "COCO"
    about = {"network": network, "metric": metric, "class_names": list(train.class_names), **_sizes(job)}
    return job, about, {"train": train.findings, "test": test.findings}


def _test_root(command: DetectCommand) -> Path:
    return command.test_data or command.data[0]


def _voc_ap(command: DetectCommand) -> Any:
    if command.voc_ap != "auto":
        return command.voc_ap
    return "11-point" if "2007" in _test_root(command).resolve().name else "area"


def _sizes(job: Job) -> dict[str, int]:
    return {"num_train": len(job.train), "num_test": len(job.test)}


def _told_data(job: Job, findings: dict[str, Findings]) -> list[str]:
    told = [f"{len(job.train):,} images to train on, {len(job.test):,} to judge"]
    return told + [f"{part}: {line}" for part, found in findings.items() for line in found.lines()]


def _told_schedule(loop: LoopOptions, network: str) -> str:
    schedule = loop.schedule
    steps = " and ".join(f"{step:,}" for step in schedule.steps)
    return (
        f"{network}: {schedule.iterations:,} iterations of {loop.batch} images, lr {schedule.lr:g} after "
        f"{schedule.warmup:,} of warm-up, x0.1 at {steps}"
    )


def _loop_result(loop: LoopOptions) -> dict[str, Any]:
    schedule = dataclasses.asdict(loop.schedule)
    return {**schedule, "batch": loop.batch, "seed": loop.seed, "precise_bn": loop.precise_bn}


def _summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and sample standard deviation of each number over the runs that have it."""
    mean: dict[str, float | None] = {}
    std: dict[str, float | None] = {}
    for name in runs[0]:
        values = [run[name] for run in runs if run.get(name) is not None]
        mean[name] = round(statistics.fmean(values), 4) if values else None
        std[name] = round(statistics.stdev(values), 4) if len(values) > 1 else None
    return {"mean": mean, "std": std if len(runs) > 1 else None}

"""The flags of `linerate eval detect`, and what the paper does where they say nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from linerate.shards.errors import UserError

Task = Literal["detection", "keypoints", "segmentation"]
_SIDE_STEP = 32


@dataclass(frozen=True, kw_only=True)
class DetectCommand:
    """Fine-tune a run's encoder on detection, keypoints or segmentation, and judge it; resumable."""

    run: tyro.conf.Positional[Path]
    """Run folder, or one checkpoint of it: the network, and with --init run its weights."""
    data: tuple[Path, ...]
    """Folder of the data set; for VOC several are trained on together, as those of 2007 and 2012."""
    format: Literal["voc", "coco"]
    """Layout of the folder."""
    out: Path
    """Folder for log, checkpoints and results; the same command goes on from them."""
    task: Task = "detection"
    """What is learned; keypoints need --format coco, segmentation --format voc."""
    network: Literal["c4", "fpn", "dilated-c5"] | None = None
    """None: c4, and for keypoints fpn. Segmentation has FCN-16s alone."""
    predict: Literal["box", "box+mask"] | None = None
    """None: box for VOC, box+mask for COCO."""
    init: str = "run"
    """`run`, `random`, or a file: a state dict with torchvision's names, as a supervised ResNet's."""
    schedule: Literal["1x", "2x", "6x", "24k", "9k", "30k"] | None = None
    """None: 24k for VOC, 2x for COCO, 30k for segmentation. 9k is for trainval of VOC 2007 alone."""
    batch: int = 16
    """Images an iteration over all ranks; another than 16 scales lr and iterations."""
    iterations: int | None = None
    """For trials: this length instead of the schedule's, its steps at the same shares."""
    lr: float | None = None
    """Instead of the scaled rate."""
    short_side: str | None = None
    """Training: LOW-HIGH in steps of 32 pixels, or one number. None: 480-800 for VOC, 640-800 for COCO."""
    test_side: int | None = None
    """Judging; None: the highest of --short-side."""
    max_side: int = 1333
    """The long side is never longer."""
    crop: int = 513
    """Segmentation: side of the training crops, pixels."""
    rois: int = 512
    """RoIs that are trained on, an image."""
    proposals: int = 1000
    """The RPN's proposals that are judged, an image."""
    train_set: str | None = None
    """Split; None: trainval, train2017, and for segmentation train."""
    test_set: str | None = None
    """Split; None: test, val2017, and for segmentation val."""
    test_data: Path | None = None
    """Folder of the test split; None: the first of --data."""
    classes: tuple[str, ...] | None = None
    """VOC: the classes; None: all that occur in training."""
    num_classes: int = 21
    """Segmentation: classes with the background."""
    voc_ap: Literal["auto", "11-point", "area"] = "auto"
    """auto: 11-point where the test folder's name holds 2007, as its year's rules are, else area."""
    runs: int = 1
    """Trials, of seeds --seed, --seed + 1 ..., with mean and standard deviation; the paper's VOC has 5."""
    seed: int = 0
    """Of order, draws and new layers."""
    precise_bn: int = 200
    """Batches that BN statistics are taken over before judging, at most as many as were trained on."""
    checkpoint_iterations: int = 1000
    """Iterations between checkpoints."""
    log_iterations: int = 20
    """Iterations between lines of the log."""
    workers: int | None = None
    """Processes that load images; None: 4 beside a GPU, else none."""
    json: bool = False
    """One JSON object on stdout instead of a table."""

    def __post_init__(self) -> None:
        _require_task(self)
        for name in ("runs", "test_side", "max_side", "crop", "rois", "proposals"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
        for name in ("checkpoint_iterations", "log_iterations"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if self.precise_bn < 0 or (self.workers or 0) < 0 or self.seed < 0:
            raise UserError(
                f"--precise-bn {self.precise_bn}, --workers {self.workers} and --seed {self.seed} "
                "must not be negative"
            )
        if self.num_classes < 2 or self.num_classes > 255:
            raise UserError(f"--num-classes {self.num_classes} must be 2 .. 255, the background included")
        self.train_sides()

    def train_sides(self) -> tuple[int, ...]:
        """Short sides of training images. Raises UserError for words that name none."""
        text = self.short_side or ("480-800" if self.format == "voc" else "640-800")
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= low <= high:
            raise UserError(
                f"--short-side {text} is no range of pixels; give LOW-HIGH as 480-800, or one number"
            )
        return tuple(range(low, high + 1, _SIDE_STEP))

    def splits(self) -> tuple[str, str]:
        """The training and the test split."""
        train, test = {"voc": ("trainval", "test"), "coco": ("train2017", "val2017")}[self.format]
        if self.task == "segmentation":
            train, test = "train", "val"
        return self.train_set or train, self.test_set or test

    def masks(self) -> bool:
        """Whether masks are learned."""
        by_format = "box+mask" if self.format == "coco" and self.task == "detection" else "box"
        return (self.predict or by_format) == "box+mask"


def _require_task(command: DetectCommand) -> None:
    """Raise UserError for flags that do not go together."""
    task, layout = command.task, command.format
    if task == "keypoints" and (layout != "coco" or command.network not in (None, "fpn")):
        raise UserError(
            f"--task keypoints has --format coco and --network fpn alone, not {layout} and {command.network}"
        )
    if task == "segmentation" and (layout != "voc" or command.network is not None):
        raise UserError(
            "--task segmentation has --format voc and FCN-16s alone, "
            f"not {layout} and --network {command.network}"
        )
    if command.predict == "box+mask" and (layout == "voc" or task != "detection"):
        raise UserError("--predict box+mask needs the masks of --format coco and --task detection; give box")
    if layout == "coco" and len(command.data) > 1:
        raise UserError(f"--data has {len(command.data)} folders; COCO's layout has one")
    if not command.data:
        raise UserError("--data is missing: name the folder of the data set")
    if (task == "segmentation") != (command.schedule == "30k") and command.schedule is not None:
        raise UserError(
            f"--schedule {command.schedule} is not for --task {task}; 30k is segmentation's, and the only one"
        )

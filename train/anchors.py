"""The ledger: every published number that an implementation of MoCo is held against, and what was run here.

A row's `mark` says how its value was read: `read` in the paper or the reference's own pages, `transcribed` by
others from their tables, `memory`: not read again since. The last two are never shown without that word.
Nothing is claimed that was not run: such a status names the committed results file that shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Mark = Literal["read", "transcribed", "memory"]
Status = Literal["reproduced at scale", "at toy scale", "not run", "not supported"]


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """One published number."""

    part: str
    """Table or figure, in short."""
    what: str
    """What was trained and how it was judged."""
    metric: str
    """linear top-1, kNN top-1, AP50, ..."""
    value: float
    """In percent or points of AP, as published."""
    source: str
    mark: Mark = "read"
    spread: float | None = None
    """Standard deviation over trials, where one is published."""
    command: str | None = None
    """The command whose result is held against it; None: no command here does."""
    status: Status = "not run"
    result: str | None = None
    """Results file, relative to the project, that the status rests on."""


PAPER = "arXiv 1911.05722v3"
V2 = "arXiv 2003.04297"
REFERENCE = "facebookresearch/moco README"
NOTEBOOK = "facebookresearch/moco, branch colab-notebook"
LINEAR = "linear top-1"
# Rows of VOC07+12, R50-C4 that the reference's own detection page holds.
ON_THE_REFERENCES_PAGE = (
    "supervised IN-1M",
    "MoCo IN-1M",
    "MoCo v2 200 epochs",
    "MoCo v2 800 epochs",
)


def _linear_v1() -> Iterator[Anchor]:
    """Table 1: accuracy against parameters; K 65536, m 0.999."""
    rows = (
        ("ResNet-50, 24 M", 60.6, "resnet50"),
        ("ResNeXt-50-32x8d, 46 M", 63.9, "resnext50-32x8d"),
        ("ResNet-50 w2x, 94 M", 65.4, "resnet50-w2x"),
        ("ResNet-50 w4x, 375 M", 68.6, "resnet50-w4x"),
    )
    for what, value, encoder in rows:
        command = f"linerate train in1m-v1 --encoder {encoder}; linerate eval linear"
        yield _anchor("Table 1", f"MoCo v1, {what}", LINEAR, value, f"{PAPER}, 4.1", command=command)
    yield _anchor(
        *("reference", "MoCo v1, ResNet-50, 5 runs", LINEAR, 60.8, REFERENCE),
        spread=0.2,
        command="linerate train in1m-v1; linerate eval linear --runs 5",
    )
    others = {"InstDisc": 54.0, "LocalAgg": 58.8, "BigBiGAN R50": 56.6, "CPC v1": 48.7, "CPC v2 R170w": 65.9}
    for name, value in {**others, "CMC R50w2x": 68.4, "AMDIM": 68.1}.items():
        yield _anchor(
            "Table 1", f"{name} (another method)", LINEAR, value, f"{PAPER}, 4.1", mark="transcribed"
        )


def _dictionaries() -> Iterator[Anchor]:
    """Figure 3: linear accuracy against the size of the dictionary; only the large ends are in the text."""
    figure = {
        "end-to-end": {256: 54.9, 512: 56.5, 1024: 57.3},
        "memory bank": {256: 50.0, 512: 52.0, 1024: 54.1, 4096: 56.5, 16384: 57.8, 65536: 58.0},
        "MoCo": {256: 54.7, 512: 56.4, 1024: 57.5, 4096: 59.0, 16384: 60.4, 65536: 60.6},
    }
    in_text = {("memory bank", 65536), ("MoCo", 4096), ("MoCo", 65536)}
    recipes = {"end-to-end": "end-to-end", "memory bank": "memory-bank", "MoCo": "queue"}
    for name, cells in figure.items():
        for num_keys, value in cells.items():
            yield _anchor(
                *("Figure 3", f"{name}, K {num_keys:,}", LINEAR, value, f"{PAPER}, 4.1"),
                mark="read" if (name, num_keys) in in_text else "memory",
                command=f"linerate sweep in1m-v1 --over K --dictionaries {recipes[name]}",
            )
    yield _anchor("4.1", "memory bank, NCE, K 4,096", LINEAR, 54.3, f"{PAPER}, 4.1")
    for m, value in ((0.9, 55.2), (0.99, 57.8), (0.999, 59.0), (0.9999, 58.9)):
        command = "linerate sweep in1m-v1 --over m"
        yield _anchor("4.1", f"MoCo, m {m:g}, K 4,096", LINEAR, value, f"{PAPER}, 4.1", command=command)


def _linear_v2() -> Iterator[Anchor]:
    """MoCo v2's Table 1 and 2, and others' reproductions."""
    rows = (
        ("MLP head, tau 0.07", 62.9),
        ("MLP head, tau 0.2", 66.2),
        ("aug+ alone", 63.4),
        ("MLP head, aug+", 67.3),
    )
    for what, value in rows:
        yield _anchor("v2 Table 1", f"{what}, 200 epochs", LINEAR, value, V2, mark="transcribed")
    for tau, value in ((0.1, 64.9), (0.3, 65.7), (0.4, 65.0), (0.5, 64.3)):
        yield _anchor("v2", f"MLP head, tau {tau:g}, 200 epochs", LINEAR, value, V2, mark="memory")
    yield _anchor(
        *("v2 Table 1", "MoCo v2, 200 epochs, 5 runs", LINEAR, 67.5, REFERENCE),
        spread=0.1,
        command="linerate train in1m-v2; linerate eval linear --runs 5",
    )
    yield _anchor(
        *("v2 Table 2", "MoCo v2, 800 epochs", LINEAR, 71.1, REFERENCE),
        command="linerate train in1m-v2-800ep; linerate eval linear",
    )
    for what, value in (("256, 200 epochs", 61.9), ("8,192, 200 epochs", 66.6), ("1,000 epochs", 69.3)):
        yield _anchor("v2 Table 2", f"SimCLR {what} (another method)", LINEAR, value, V2, mark="transcribed")
    for epochs, value in ((100, 68.9), (300, 72.8), (1000, 74.6)):
        yield _anchor(
            "v3", f"MoCo v3, ResNet-50, {epochs} epochs", LINEAR, value, "facebookresearch/moco-v3 README"
        )
    others = (
        ("vissl, v2, 200 epochs", LINEAR, 66.4, "vissl MODEL_ZOO"),
        ("mmpretrain, v2, 200 epochs", LINEAR, 67.5, "mmpretrain configs/mocov2"),
        ("lightly, v2, 100 epochs", LINEAR, 61.5, "lightly README"),
        ("lightly, v2, 100 epochs", "kNN top-1", 41.8, "lightly README"),
        ("solo-learn, v2+, 100 epochs, symmetric", LINEAR, 66.84, "solo-learn README"),
    )
    for what, metric, value, source in others:
        yield _anchor("others' runs", what, metric, value, source)


def _cifar10() -> Iterator[Anchor]:
    """The reference's notebook for one GPU: kNN with k 200, T 0.1."""
    for loss, recipe, values in (
        ("asymmetric", "cifar10", (82.6, 86.3, 88.7)),
        ("symmetric", "cifar10-symmetric", (85.3, 88.5, 89.7)),
    ):
        for epochs, value in zip((200, 400, 800), values, strict=True):
            yield _anchor(
                *("notebook", f"CIFAR-10, {loss} loss, {epochs} epochs", "kNN top-1", value, NOTEBOOK),
                command=f"linerate train {recipe} --epochs {epochs}",
            )
    yield _anchor("notebook", "CIFAR-10, symmetric loss, 800 epochs", LINEAR, 90.7, NOTEBOOK)


def _voc() -> Iterator[Anchor]:
    """Tables 2 to 4: VOC detection, AP50, AP, AP75."""
    command = "linerate eval detect --schedule 24k --runs 5"
    tables: tuple[tuple[str, str, Mark, dict[str, tuple[float, float, float]]], ...] = (
        (
            *("Table 2b", "VOC07+12, R50-C4", "read"),
            {
                "random": (60.2, 33.8, 33.1),
                "supervised IN-1M": (81.3, 53.5, 58.8),
                "MoCo IN-1M": (81.5, 55.9, 62.6),
                "MoCo IG-1B": (82.2, 57.2, 63.7),
                "MoCo v2 200 epochs": (82.4, 57.0, 63.6),
                "MoCo v2 800 epochs": (82.5, 57.4, 64.0),
                "end-to-end": (80.4, 54.6, 60.3),
                "memory bank": (80.6, 54.9, 60.6),
            },
        ),
        (
            *("Table 2a", "VOC07+12, R50-dilated-C5", "memory"),
            {
                "random": (64.4, 37.9, 38.6),
                "supervised IN-1M": (81.4, 54.0, 59.1),
                "MoCo IN-1M": (81.1, 54.6, 59.9),
                "MoCo IG-1B": (81.6, 55.5, 61.2),
            },
        ),
        (
            *("Table 4", "VOC07, R50-C4", "transcribed"),
            {
                "supervised IN-1M": (74.4, 42.4, 42.7),
                "MoCo IN-1M": (74.9, 46.6, 50.1),
                "MoCo IG-1B": (75.6, 47.6, 51.7),
            },
        ),
    )
    for part, what, mark, rows in tables:
        for initial, values in rows.items():
            for metric, value in zip(("AP50", "AP", "AP75"), values, strict=True):
                own = mark == "read" and initial not in ON_THE_REFERENCES_PAGE
                yield _anchor(
                    *(part, f"{what}, {initial}", metric, value, f"{PAPER}, 4.2"),
                    mark="transcribed" if own else mark,
                    command=command,
                )


def _coco() -> Iterator[Anchor]:
    """Table 5: COCO, 2x schedule, box and mask."""
    names = ("box AP", "box AP50", "box AP75", "mask AP", "mask AP50", "mask AP75")
    rows = {
        ("R50-FPN", "supervised IN-1M"): (40.6, 61.3, 44.4, 36.8, 58.1, 39.5),
        ("R50-FPN", "MoCo IN-1M"): (40.8, 61.6, 44.7, 36.9, 58.4, 39.7),
        ("R50-FPN", "MoCo IG-1B"): (41.1, 61.8, 45.1, 37.4, 59.1, 40.2),
        ("R50-C4", "supervised IN-1M"): (40.0, 59.9, 43.1, 34.7, 56.5, 36.9),
        ("R50-C4", "MoCo IN-1M"): (40.7, 60.5, 44.1, 35.4, 57.3, 37.6),
        ("R50-C4", "MoCo IG-1B"): (41.1, 60.7, 44.8, 35.6, 57.4, 38.1),
    }
    command = "linerate eval detect --schedule 2x"
    for (network, initial), values in rows.items():
        for metric, value in zip(names, values, strict=True):
            yield _anchor(
                *("Table 5", f"COCO 2x, {network}, {initial}", metric, value, f"{PAPER}, 4.2"),
                mark="transcribed",
                command=command,
            )
    for metric, value in zip(names[:3], (38.5, 58.3, 41.6), strict=True):
        yield _anchor("1x", "COCO 1x, R50-C4, MoCo IN-1M", metric, value, PAPER, mark="memory")
    for initial, value in (("supervised", 41.9), ("random", 41.4), ("MoCo IG-1B", 42.8)):
        yield _anchor("A.8", f"COCO 6x, R50-FPN, {initial}", "box AP", value, f"{PAPER}, A.8")


def _other_transfer() -> Iterator[Anchor]:
    """Table 6 and the appendix: supervised, MoCo IN-1M, MoCo IG-1B."""
    initials = ("supervised IN-1M", "MoCo IN-1M", "MoCo IG-1B")
    finetune = "linerate eval finetune"
    rows: tuple[tuple[str, str, tuple[float, float, float], str | None], ...] = (
        ("COCO keypoints", "AP", (65.8, 66.8, 66.9), "linerate eval detect --task keypoints"),
        ("COCO DensePose", "AP75", (50.6, 53.9, 54.3), None),
        ("LVIS v0.5", "mask AP", (24.4, 24.1, 24.9), None),
        ("Cityscapes instances", "AP50", (59.6, 59.3, 60.3), None),
        ("Cityscapes semantic", "mIoU", (74.6, 75.3, 75.5), None),
        ("VOC semantic", "mIoU", (74.4, 72.5, 73.6), "linerate eval detect --task segmentation"),
        ("iNaturalist-18 fine-tuned", "top-1", (66.1, 65.6, 65.8), finetune),
    )
    for what, metric, values, command in rows:
        for initial, value in zip(initials, values, strict=True):
            yield _anchor(
                *("Table 6", f"{what}, {initial}", metric, value, f"{PAPER}, 4.2 and A"),
                mark="transcribed",
                command=command,
                status="not run" if command else "not supported",
            )
    yield _anchor(
        "A.6", "iNaturalist-18 fine-tuned, random", "top-1", 61.8, f"{PAPER}, A.6", command=finetune
    )
    for initial, value in (("random", 76.5), ("MoCo IN-1M", 77.0), ("MoCo IG-1B", 77.3)):
        yield _anchor(
            "A.7", f"IN-1M fine-tuned, {initial}", "top-1", value, f"{PAPER}, A.7", command=finetune
        )


def _anchor(
    part: str,
    what: str,
    metric: str,
    value: float,
    source: str,
    *,
    mark: Mark = "read",
    spread: float | None = None,
    command: str | None = None,
    status: Status = "not run",
) -> Anchor:
    return Anchor(
        part=part,
        what=what,
        metric=metric,
        value=value,
        source=source,
        mark=mark,
        spread=spread,
        command=command,
        status=status,
    )


ANCHORS: tuple[Anchor, ...] = tuple(
    anchor
    for rows in (_linear_v1, _dictionaries, _linear_v2, _cifar10, _voc, _coco, _other_transfer)
    for anchor in rows()
)

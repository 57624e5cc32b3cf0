"""Which image is in which batch, and the images as tensors: pure functions of seed and iteration.

So a run that was killed goes on with the very batches that it would have had, and needs no state for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transforms

from linerate.shards.errors import UserError
from linerate.train.evaluate.detect.annotations import AnnotatedImage, AnnotatedSet, Instance

Target = dict[str, Tensor]


@dataclass(frozen=True)
class Item:
    """One image as a network takes it."""

    image: Tensor
    """(3, H, W) float32 in 0 .. 1."""
    target: Target
    index: int
    """Its place in the set."""
    damage: str = ""
    """Why another image stands in the place of the one that was asked for."""


class Source(Protocol):
    """The images of a data set, one at a time."""

    def __len__(self) -> int:
        """Images."""

    def load(self, index: int, draws: np.random.Generator | None) -> tuple[Tensor, Target]:
        """The image and its target, augmented as the generator says; None: as it is.

        Raises OSError or ValueError where it cannot be decoded.
        """


class BatchOrder:
    """The shuffled stream: epoch after epoch, cut into batches without a gap.

    Image number p of the stream is place p mod N of the permutation of epoch p // N.
    """

    def __init__(self, num_images: int, *, batch: int, seed: int) -> None:
        self.num_images, self.batch, self.seed = num_images, batch, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def places(self, iteration: int) -> list[tuple[int, int]]:
        """(place in the stream, index of the image) of each member of a batch."""
        start = iteration * self.batch
        return [(place, self._index(place)) for place in range(start, start + self.batch)]

    def _index(self, place: int) -> int:
        epoch, within = divmod(place, self.num_images)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng((self.seed, epoch)).permutation(self.num_images)
        return int(self._permutation[within])


class _Drawn(Dataset[Item]):
    def __init__(self, source: Source, seed: int) -> None:
        self.source, self.seed = source, seed

    def __getitem__(self, at: tuple[int, int]) -> Item:
        place, index = at
        damage = ""
        for shift in range(len(self.source)):
            now = (index + shift) % len(self.source)
            draws = np.random.default_rng((self.seed, 1, place))
            try:
                image, target = self.source.load(now, draws)
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                damage = damage or f"{error}"
                continue
            return Item(image, target, now, damage)
        raise UserError(
            f"none of the {len(self.source):,} images can be decoded, the first because: {damage}"
        )


class _Judged(Dataset[Item]):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, index: int) -> Item:
        try:
            image, target = self.source.load(index, None)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            return Item(torch.empty(0), {}, index, f"{error}")
        return Item(image, target, index)


def _as_list(items: list[Any]) -> list[Any]:
    return items


def train_batches(
    source: Source,
    order: BatchOrder,
    *,
    start: int,
    stop: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterator[list[Item]]:
    """This rank's share of the batches of iterations start .. stop - 1."""
    share = order.batch // world_size
    mine = slice(rank * share, (rank + 1) * share)
    batches = (order.places(iteration)[mine] for iteration in range(start, stop))
    loader: DataLoader[Any] = DataLoader(
        _Drawn(source, order.seed),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_list,
    )
    yield from loader


def judged_items(source: Source, indices: Sequence[int], *, workers: int = 0) -> Iterator[Item]:
    """The images one by one, as they are; one that cannot be decoded comes empty, with its damage."""
    loader: DataLoader[Any] = DataLoader(
        _Judged(source), batch_size=None, sampler=list(indices), num_workers=workers
    )
    yield from loader


class DetectionSource:
    """The images of an annotated set with boxes, labels 1 .. C, and what else is asked for.

    Augmented by a left-right flip, half of the time; the network's transform draws the size.
    """

    def __init__(self, annotated: AnnotatedSet, *, masks: bool = False) -> None:
        self.annotated, self.masks = annotated, masks
        self._swap = _left_right(annotated.keypoint_names)

    def __len__(self) -> int:
        return len(self.annotated.images)

    def load(self, index: int, draws: np.random.Generator | None) -> tuple[Tensor, Target]:
        """The image and its target; draws: None leaves it as it is. Raises OSError, ValueError."""
        entry = self.annotated.images[index]
        image = load_image(entry)
        if draws is None:
            return image, {}
        target = self._target(entry)
        return self._flip(image, target) if draws.random() < 0.5 else (image, target)

    def _target(self, entry: AnnotatedImage) -> Target:
        instances = entry.instances
        target = {
            "boxes": torch.tensor([one.box for one in instances], dtype=torch.float32),
            "labels": torch.tensor([one.label + 1 for one in instances], dtype=torch.int64),
        }
        if self.masks:
            masks = [draw_mask(one, height=entry.height, width=entry.width) for one in instances]
            target["masks"] = torch.from_numpy(np.stack(masks))
        if self.annotated.keypoint_names:
            points = torch.tensor([one.keypoints for one in instances], dtype=torch.float32)
            target["keypoints"] = points.view(len(instances), -1, 3)
        return target

    def _flip(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        width = image.shape[-1]
        flipped = dict(target)
        x0, y0, x1, y1 = target["boxes"].unbind(1)
        flipped["boxes"] = torch.stack((width - x1, y0, width - x0, y1), dim=1)
        if "masks" in target:
            flipped["masks"] = target["masks"].flip(-1)
        if "keypoints" in target:
            points = target["keypoints"][:, self._swap].clone()
            points[..., 0] = torch.where(points[..., 2] > 0, width - points[..., 0], points[..., 0])
            flipped["keypoints"] = points
        return image.flip(-1), flipped


def load_image(entry: AnnotatedImage) -> Tensor:
    """(3, H, W) float32 in 0 .. 1. The EXIF orientation is not applied: boxes are of the stored pixels.

    Raises OSError where it cannot be decoded, ValueError where its size is not the annotation's.
    """
    with Image.open(entry.path) as opened:
        if (opened.height, opened.width) != (entry.height, entry.width):
            raise ValueError(
                f"{entry.path} is {opened.width}x{opened.height}, "
                f"its annotation says {entry.width}x{entry.height}"
            )
        pixels = transforms.pil_to_tensor(opened.convert("RGB"))
    image: Tensor = pixels.float().div_(255)
    return image


def draw_mask(one: Instance, *, height: int, width: int) -> NDArray[np.uint8]:
    """(H, W) of 0 and 1: the polygons or run lengths drawn; the whole box where there is no segment."""
    if not one.segment:
        mask = np.zeros((height, width), dtype=np.uint8)
        x0, y0, x1, y1 = (round(edge) for edge in one.box)
        mask[y0:y1, x0:x1] = 1
        return mask
    from pycocotools import mask as coco_mask

    with warnings.catch_warnings():
        # pycocotools 2.0.11 hands its rows to numpy 2 by a way that numpy calls deprecated.
        warnings.filterwarnings("ignore", message=".*__array__ implementation", category=DeprecationWarning)
        drawn: NDArray[np.uint8] = coco_mask.decode(run_lengths(one, height=height, width=width))
    return drawn


def run_lengths(one: Instance, *, height: int, width: int) -> dict[str, Any]:
    """An instance's segment as COCO's compressed run lengths."""
    from pycocotools import mask as coco_mask

    if isinstance(one.segment, list):
        merged: dict[str, Any] = coco_mask.merge(coco_mask.frPyObjects(one.segment, height, width))
        return merged
    if isinstance(one.segment["counts"], list):
        packed: dict[str, Any] = coco_mask.frPyObjects(one.segment, height, width)
        return packed
    return dict(one.segment)


def _left_right(names: Sequence[str]) -> list[int]:
    """The place of each point's mirror image: left_eye's is right_eye's; others are their own."""
    places = {name: place for place, name in enumerate(names)}
    swapped = []
    for name in names:
        other = name.replace("left", "\0").replace("right", "left").replace("\0", "right")
        swapped.append(places.get(other, places[name]))
    return swapped

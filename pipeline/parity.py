"""How far DALI's views lie from torchvision's on the same draws, per operation and for whole recipes.

Differences are in grey levels (0..255), over all channels of all views.
"""

from __future__ import annotations

import importlib.util
import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from linerate.pipeline.dali_graph import Form
from linerate.pipeline.dali_views import views_of_draws
from linerate.pipeline.draws import Draw, Draws, draw_views
from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.recipe import OneView, ViewRecipe
from linerate.pipeline.torch_views import decode_all, decode_rgb, reference_views

# The greatest mean difference that is taken for the same operation.
MEAN_BOUNDS = {
    "crop": 0.3,  # the operators, 0.17: DALI keeps fractions between rows and columns; the kernels, 0.002
    "flip": 0.0,
    "brightness": 0.001,
    "contrast": 0.05,
    "saturation": 0.05,
    "hue": 0.05,
    "jitter": 0.1,
    "gray": 0.001,
    "blur": 0.05,
    "solarize": 0.0,
}
RECIPE_MEAN_BOUND = 0.5

_EVERY = OneView(jitter_probability=1, gray_probability=1, blur_probability=1, solarize_probability=1)
_SWITCHES = (Draw.JITTER, Draw.GRAY_FIRST, Draw.GRAY, Draw.BLUR_SIGMA, Draw.SOLARIZE, Draw.FLIP)
_NEUTRAL = {Draw.BRIGHTNESS: 1.0, Draw.CONTRAST: 1.0, Draw.SATURATION: 1.0, Draw.HUE: 0.0}
_JITTERS = (Draw.BRIGHTNESS, Draw.CONTRAST, Draw.SATURATION, Draw.HUE)


@dataclass(frozen=True)
class Difference:
    """Of one operation, or of a whole recipe."""

    name: str
    num_views: int
    mean: float
    p99: float
    max: float
    mean_bound: float

    @property
    def met(self) -> bool:
        return self.mean <= self.mean_bound


def measure_parity(
    batch: EncodedBatch,
    *,
    recipe: ViewRecipe,
    seed: int = 0,
    epoch: int = 0,
    device: str = "cpu",
    form: Form | None = None,
    num_threads: int = 1,
) -> list[Difference]:
    """One Difference an operation, and one for the recipe. Raises UndecodableImages.

    The operations after the crop are compared on equal input: the reference's crops, losslessly encoded.
    """
    images = decode_all(batch)
    size = recipe.size
    drawn = draw_views(
        ViewRecipe(name="every", size=size, query=_EVERY, key=_EVERY),
        seed=seed,
        epoch=epoch,
        sample_id=batch.sample_id,
        height=batch.height,
        width=batch.width,
        view=0,
    )
    plain = only(drawn, None)
    crops = reference_views(images, plain, size=size)
    pngs = [_png(crop) for crop in crops.numpy()]
    crop_images = [crop.permute(2, 0, 1) for crop in crops]

    names = [name for name in MEAN_BOUNDS if name != "crop"]
    cases = [("crop", MEAN_BOUNDS["crop"], batch.jpegs, images, plain)]
    cases += [
        (name, MEAN_BOUNDS[name], pngs, crop_images, _whole_image(only(drawn, name), size)) for name in names
    ]
    for view in (0, 1):
        draws = draw_views(
            recipe,
            seed=seed,
            epoch=epoch,
            sample_id=batch.sample_id,
            height=batch.height,
            width=batch.width,
            view=view,
        )
        cases.append((recipe.name, RECIPE_MEAN_BOUND, batch.jpegs, images, draws))
    ours = _ours(
        [(data, draws) for _, _, data, _, draws in cases],
        size=size,
        device=device,
        form=form,
        num_threads=num_threads,
    )
    levels: dict[str, list[Tensor]] = {}
    for (name, _, _, originals, draws), views in zip(cases, ours, strict=True):
        reference = reference_views(originals, draws, size=size)
        levels.setdefault(name, []).append((views.int() - reference.int()).abs())
    bounds = {name: bound for name, bound, *_ in cases}
    return [_difference(name, found, bounds[name]) for name, found in levels.items()]


def measure_ffcv_decoder(batch: EncodedBatch) -> Difference | None:
    """How far ffcv's decoded images lie from Pillow's, as information: no bound. None without ffcv.

    CMYK images are left out: a .beton holds them converted.
    """
    if importlib.util.find_spec("ffcv") is None:
        return None
    from linerate.pipeline.ffcv_views import decode_by_ffcv

    levels = []
    for row, jpeg in enumerate(batch.jpegs):
        if Image.open(io.BytesIO(jpeg.data)).mode in ("RGB", "L"):
            height, width = int(batch.height[row]), int(batch.width[row])
            ours = torch.from_numpy(decode_by_ffcv(jpeg, height=height, width=width)).int()
            levels.append((ours - decode_rgb(jpeg).permute(1, 2, 0).int()).abs()[None])
    return _difference("decoded by ffcv", levels, float("inf")) if levels else None


def only(draws: Draws, name: str | None) -> Draws:
    """The same draws with everything switched off but the crop and the operation of that name."""
    array = draws.array.copy()
    array[:, _SWITCHES] = 0
    if name in ("brightness", "contrast", "saturation", "hue", "jitter"):
        array[:, Draw.JITTER] = 1
        if name != "jitter":
            kept = Draw[name.upper()]
            for column, neutral in _NEUTRAL.items():
                if column != kept:
                    array[:, column] = neutral
    elif name == "blur":
        array[:, Draw.BLUR_SIGMA] = draws[Draw.BLUR_SIGMA]
    elif name is not None:
        array[:, Draw[name.upper()]] = 1
    return Draws(array)


def _whole_image(draws: Draws, size: int) -> Draws:
    array = draws.array.copy()
    array[:, Draw.TOP : Draw.RIGHT + 1] = (0, 0, size, size)
    return Draws(array)


def _ours(
    cases: list[tuple[list[npt.NDArray[np.uint8]], Draws]],
    *,
    size: int,
    device: str,
    form: Form | None,
    num_threads: int,
) -> list[Tensor]:
    """The views of every case. One batch for all of them: building a graph costs more than these views."""
    # The graph makes two views of an image; here the second repeats the draws and is left.
    jpegs = [jpeg for data, _ in cases for jpeg in data]
    draws = Draws(np.concatenate([one.array for _, one in cases]))
    views, _ = views_of_draws(
        jpegs, (draws, draws), size=size, device=device, form=form, num_threads=num_threads
    )
    return list(torch.split(views, [len(data) for data, _ in cases]))


def _difference(name: str, levels: list[Tensor], bound: float) -> Difference:
    flat = torch.cat([one.flatten() for one in levels]).numpy()
    counts = np.bincount(flat, minlength=256)
    return Difference(
        name=name,
        num_views=sum(len(one) for one in levels),
        mean=float(flat.mean()),
        p99=float(np.searchsorted(np.cumsum(counts), 0.99 * flat.size)),
        max=float(flat.max()),
        mean_bound=bound,
    )


def _png(view: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    file = io.BytesIO()
    Image.fromarray(view).save(file, "PNG", compress_level=1)
    return np.frombuffer(file.getvalue(), dtype=np.uint8)

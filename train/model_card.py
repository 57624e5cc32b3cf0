"""What exported weights are, in Markdown: for whoever finds the file a year later."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from linerate import __version__
from linerate.train.checkpoint import TrainedEncoder
from linerate.train.config import TrainConfig
from linerate.train.detectron2_names import CONFIG_LINES, depth_of


def model_card(
    trained: TrainedEncoder, *, target: str, file_name: str, num_parameters: int, max_difference: float
) -> str:
    """The card: what the weights are, how the target library loads them, what they were made with."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in _rows(trained, num_parameters))
    return f"""# {trained.config.model.encoder}, pretrained with MoCo ({trained.config.recipe})

| | |
|---|---|
{rows}

Input: RGB in [0, 1], less the mean (0.485, 0.456, 0.406), divided by (0.229, 0.224, 0.225).

```{"yaml" if target == "detectron2" else "python"}
{_usage(trained, target=target, file_name=file_name)}
```

Loaded so, its features were equal to the run's own to {max_difference:.1e} of the largest.
"""


def _rows(trained: TrainedEncoder, num_parameters: int) -> list[tuple[str, str]]:
    config = trained.config
    model, optim, views = config.model, config.optim, config.views
    return [
        ("encoder", f"{model.encoder}, stem {model.stem}, {num_parameters:,} parameters without the head"),
        ("recipe", f"{config.recipe}, seed {config.seed}"),
        ("data", _data(trained)),
        ("views", f"augmentation {views.augmentation}, {views.size} pixels"),
        ("dictionary", _dictionary(config)),
        ("loss", _loss(config)),
        ("head", f"{model.head}, to {model.dim} dimensions (not in the file unless it is safetensors)"),
        (
            "optimizer",
            f"{optim.optimizer.upper()}, batch {optim.global_batch}, lr {optim.lr:g}, "
            f"weight decay {optim.weight_decay:g}",
        ),
        ("trained", f"{trained.step:,} steps, {trained.images:,} images"),
        ("checkpoint", trained.path.name),
        ("versions", f"linerate {__version__}, torch {version('torch')}, timm {version('timm')}"),
    ]


def _data(trained: TrainedEncoder) -> str:
    shards = trained.trained_on
    if shards is None:
        return "not told: the weights were imported"
    return f"{shards.num_samples:,} images, shards {Path(shards.folder).name} (plan {shards.plan_id})"


def _dictionary(config: TrainConfig) -> str:
    kind, num_keys = config.dictionary.dictionary, config.num_negatives
    if kind == "queue":
        return f"queue of K = {num_keys:,} keys, m = {config.model.ema_momentum}"
    if kind == "end-to-end":
        return f"end-to-end, the {num_keys:,} other images of the batch are the negatives"
    return f"memory bank, K = {num_keys:,} draws, momentum {config.dictionary.bank_momentum}"


def _loss(config: TrainConfig) -> str:
    name = "NCE" if config.dictionary.bank_loss == "nce" else "InfoNCE"
    return f"{name}, temperature {config.loss.temperature}{', symmetric' if config.loss.symmetric else ''}"


def _usage(trained: TrainedEncoder, *, target: str, file_name: str) -> str:
    model = trained.config.model
    if target == "timm":
        return f'model = timm.create_model("{model.encoder}", num_classes=0, checkpoint_path="{file_name}")'
    if target == "detectron2":
        # The mean and the deviation are those of the encoder's entry, in grey levels.
        depth = depth_of(model.encoder)
        # detectron2 refuses its default of 256 for blocks without a bottleneck.
        return CONFIG_LINES.format(
            file_name=file_name, depth=depth, width=256 if depth >= 50 else 64
        ).rstrip()
    read = "safetensors.torch.load_file" if file_name.endswith(".safetensors") else "torch.load"
    if target == "torchvision":
        return (
            f"model = torchvision.models.{model.encoder}()\n"
            f'model.load_state_dict({read}("{file_name}"), strict=False)  # all but fc, yours to train'
        )
    return (
        "from linerate.train.encoder import build_encoder\n\n"
        f'encoder = build_encoder("{model.encoder}", dim={model.dim}, head="{model.head}", '
        f'stem="{model.stem}")\n'
        f'encoder.load_state_dict({read}("{file_name}"))'
    )

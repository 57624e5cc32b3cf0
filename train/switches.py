"""The speed switches as they hold on this machine: what is on, and in words why something is off."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch

from linerate.train.config import Speed, TrainConfig

NO_CUDA = "no CUDA device"


@dataclass(frozen=True, kw_only=True)
class Switches:
    """What the step will do; a switch that was asked for and cannot be had is off, and `reasons` says why."""

    precision: str
    channels_last: bool
    compile: Literal["off", "encoders", "step"]
    cuda_graphs: bool
    side_stream: bool
    fused_update: bool
    kernels: bool
    """Whether Triton may run InfoNCE and the update."""
    micro_batch: int | None
    """None: a rank's batch passes the encoders at once."""
    reasons: dict[str, str]
    """Switch -> why it stands as it does, where that is not plainly what was asked for."""

    def words(self) -> dict[str, str]:
        """Switch -> its state with the reason, as `off: no CUDA device`."""
        states = {
            "precision": self.precision,
            "channels_last": _on(self.channels_last),
            "compile": self.compile,
            "cuda_graphs": _on(self.cuda_graphs),
            "side_stream": _on(self.side_stream),
            "fused_update": _on(self.fused_update),
            "kernels": _on(self.kernels),
            "micro_batch": str(self.micro_batch or "off"),
        }
        return {
            name: f"{state}: {self.reasons[name]}" if name in self.reasons else state
            for name, state in states.items()
        }


def resolve_switches(config: TrainConfig, *, world_size: int, device_type: str | None = None) -> Switches:
    """The switches of a run on that many ranks; the one place that decides.

    device_type: cuda or cpu; None: what this machine has.
    """
    speed = config.speed
    on_gpu = (device_type or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    refusals = {
        "cuda_graphs": _why_no_graphs(config, world_size=world_size, on_gpu=on_gpu),
        "side_stream": _why_no_side_stream(config, on_gpu=on_gpu),
        "fused_update": _why_no_fused_update(config, on_gpu=on_gpu),
        "kernels": _why_no_kernels(on_gpu=on_gpu),
    }
    reasons = {name: why for name, why in refusals.items() if why}
    if speed.precision == "auto" and not on_gpu:
        reasons["precision"] = f"{NO_CUDA}, and bf16 is slower on most CPUs"
    if not speed.channels_last:
        reasons["channels_last"] = "--no-channels-last"
    if speed.compile == "off":
        reasons["compile"] = "it takes a minute or more at the start; `linerate tune` times it"
    if speed.micro_batch is None:
        reasons["micro_batch"] = "a rank's batch passes the encoders at once"
    return Switches(
        precision=resolve_precision(speed, on_gpu=on_gpu),
        channels_last=speed.channels_last,
        compile=speed.compile,
        cuda_graphs="cuda_graphs" not in reasons,
        side_stream="side_stream" not in reasons,
        fused_update="fused_update" not in reasons,
        kernels="kernels" not in reasons,
        micro_batch=speed.micro_batch,
        reasons=reasons,
    )


def resolve_precision(speed: Speed, *, on_gpu: bool | None = None) -> str:
    """fp32, bf16 or fp16; auto is bf16 where there is a GPU. on_gpu: None: what this machine has."""
    if speed.precision != "auto":
        return speed.precision
    return "bf16" if (torch.cuda.is_available() if on_gpu is None else on_gpu) else "fp32"


def _why_no_graphs(config: TrainConfig, *, world_size: int, on_gpu: bool) -> str | None:
    if not on_gpu:
        return NO_CUDA
    if not config.speed.cuda_graphs:
        return "not measured yet; --cuda-graphs records both passes"
    if world_size > 1:
        return f"{world_size} ranks: what they send differs from step to step"
    if config.speed.precision == "fp16":
        return "fp16's scaler changes its scale on the host; take bf16"
    if config.dictionary.dictionary == "memory-bank":
        return "a memory bank draws its keys on the host, each step"
    return None


def _why_no_side_stream(config: TrainConfig, *, on_gpu: bool) -> str | None:
    if not on_gpu:
        return NO_CUDA
    if not config.speed.side_stream:
        return "not measured yet; --side-stream runs both forwards at once"
    if config.dictionary.dictionary != "queue":
        return f"a {config.dictionary.dictionary} has no key encoder of its own"
    return None


def _why_no_fused_update(config: TrainConfig, *, on_gpu: bool) -> str | None:
    if not on_gpu:
        return NO_CUDA
    if config.speed.fused_update == "off":
        return "--fused-update off"
    if config.optim.optimizer != "sgd":
        return f"{config.optim.optimizer} has no kernel"
    if config.dictionary.dictionary != "queue":
        return f"a {config.dictionary.dictionary} has no key encoder to move along"
    return None


def _why_no_kernels(*, on_gpu: bool) -> str | None:
    if not on_gpu:
        return NO_CUDA
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _on(state: bool) -> str:
    return "on" if state else "off"

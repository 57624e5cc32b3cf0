"""The parts of a config that may not change results: speed switches, and what is watched and kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from linerate.shards.errors import UserError
from linerate.train.config_checks import at_least


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Switches that may not change results beyond the bounds stated in the tests."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the encoders; auto: bf16 on a GPU, fp32 on a CPU. Master weights are always fp32. fp16
    scales the loss, and the scaler makes the host wait for the device each step."""
    channels_last: bool = True
    """Whether activations lie NHWC in memory."""
    fused_update: Literal["auto", "on", "off"] = "auto"
    """Whether SGD and the key encoder's EMA run as one Triton kernel; auto: on a GPU."""
    compile: Literal["off", "encoders", "step"] = "off"
    """What torch.compile works on: the encoders, or of the whole step whatever is worth it. It takes a minute
    or more at the start. --compile alone is encoders, --no-compile off."""
    cuda_graphs: bool = False
    """Whether a step's two passes are recorded once as a CUDA graph and replayed; on one GPU, not in fp16."""
    side_stream: bool = False
    """Whether the key forward runs beside the query forward, on a CUDA stream of its own."""
    micro_batch: int | None = None
    """Images of a rank that pass an encoder at once, where its batch needs too much memory; None: all."""
    loader_threads: int | None = None
    """Threads that decode on each rank; None: the cores divided by the ranks of this machine."""
    prefetch: int = 2
    """Batches that the loader prepares ahead."""
    hw_decoder_load: float = 0.65
    """Share of a batch that the JPEG unit of a GPU decodes, the rest its other units; nothing on a CPU."""

    def __post_init__(self) -> None:
        # Checkpoints and profiles from when there was no third choice.
        if isinstance(self.compile, bool):
            object.__setattr__(self, "compile", "encoders" if self.compile else "off")
        at_least("micro_batch", self.micro_batch, 1)
        at_least("loader_threads", self.loader_threads, 1)
        at_least("prefetch", self.prefetch, 1)
        if not 0 <= self.hw_decoder_load <= 1:
            raise UserError(
                f"hw_decoder_load={self.hw_decoder_load} is no share of a batch; give one in [0, 1], as 0.65"
            )


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is reported and kept; nothing here changes a result."""

    log_steps: int = 50
    """Iterations between two lines of the log; the device is read then and only then."""
    checkpoint_steps: int = 1000
    """Iterations between two checkpoints; one more is written at the end and on a signal."""
    keep_checkpoints: int = 3
    """Checkpoints that stay on the disk, newest first, besides the milestones."""
    milestone_epochs: int = 0
    """Epochs between two checkpoints that stay for ever; 0: none do."""
    knn_epochs: int = 0
    """Epochs between two runs of the kNN monitor; 0: never."""
    knn_train: str | None = None
    """Labelled shards that the monitor votes with; None: the training shards, less a held-out share."""
    knn_test: str | None = None
    """Labelled shards that the monitor judges; None: the held-out share of the others."""
    knn_test_share: float = 0.1
    """Share of the samples that is held out where there are no test shards."""
    knn_limit: int = 50_000
    """Most images of each of the two sets that the monitor looks at."""
    knn_k: int = 200
    """k: neighbours that vote."""
    knn_temperature: float = 0.1
    """A neighbour's vote weighs exp(cosine / temperature)."""
    knn_features: Literal["backbone", "projection"] = "backbone"
    """What is compared: the pooled features, or the C-dimensional queries."""
    trackers: tuple[str, ...] = ()
    """Accelerate's trackers besides log.jsonl: tensorboard, wandb, or both."""
    bad_share: float = 0.001
    """Share of an epoch's samples that a rank may replace by neighbours as damaged; 0: none."""
    alarm_steps: int = 1000
    """Steps for which the loss must stay at chance, and before features may be judged, for an alarm."""
    alarm_chance_share: float = 0.01
    """A loss no further than this share from ln(K+1) is at chance."""
    alarm_feature_std: float = 0.02
    """The features' std over the batch below which they have collapsed; 1: spread evenly, 0: all the same."""
    alarm_top1: float = 0.99
    """Pretext accuracy above which a falling kNN means that BN gives the keys away."""
    alarm_knn_fall: float = 0.01
    """How far below its best kNN must lie to be falling."""
    alarm_turnover: float = 0.5
    """Share of the keys due to change that must have changed."""
    alarm_data_wait: float = 0.1
    """Share of the time that a run may wait for batches."""
    stall_seconds: float = 900.0
    """A rank that gets no batch for so long writes its stacks and ends with exit code 75; 0: it waits."""

    def __post_init__(self) -> None:
        shares = ("chance_share", "feature_std", "top1", "knn_fall", "turnover", "data_wait")
        for name in (f"alarm_{share}" for share in shares):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} is no share; give one in [0, 1]")
        for name in (
            "log_steps",
            "checkpoint_steps",
            "keep_checkpoints",
            "knn_k",
            "knn_limit",
            "alarm_steps",
        ):
            at_least(name, getattr(self, name), 1)
        for name in ("knn_epochs", "milestone_epochs"):
            at_least(name, getattr(self, name), 0)
        if not 0 <= self.bad_share < 1:
            raise UserError(f"bad_share={self.bad_share} is no share of the samples; give one in [0, 1)")
        if self.stall_seconds < 0:
            raise UserError(f"stall_seconds={self.stall_seconds} must not be negative; 0 waits for ever")
        if not 0 < self.knn_test_share < 1:
            raise UserError(f"knn_test_share={self.knn_test_share} must lie between 0 and 1, as 0.1")
        if not self.knn_temperature > 0:
            raise UserError(f"knn_temperature={self.knn_temperature} must be above 0, as 0.07 or 0.1")

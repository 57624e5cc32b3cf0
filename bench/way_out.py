"""The verdict in one sentence: what bounds the run, its figures, and what would lift it to how much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from linerate.bench.bottleneck import BatchModel, Bottleneck
from linerate.train.config import TrainConfig

# What is named as a way out gives at least this much.
LEAST_GAIN = 1.03
LEAST_SHARE = 0.1
_TUNED = ("--compile", "--side-stream", "--cuda-graphs", "--channels-last")


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a way out depends on besides the times."""

    config: TrainConfig
    on_gpu: bool
    cores: int
    """Usable by this process."""
    loader_threads: int
    step_threads: int
    """torch's, inside an operation."""
    sample_bytes: float
    """Mean."""
    divided_share: float = 1.0
    """Of the time of decoding, what divides over the loader's threads, as measured with half of them."""
    decode_s_by_load: Mapping[float, float] = field(default_factory=dict)
    """--hw-decoder-load -> seconds of decoding a batch, as measured; {} where there is no JPEG unit"""


def show_rate(pairs_per_s: float) -> str:
    """Three digits, as `2,900` and `0.31`."""
    return f"{float(f'{pairs_per_s:.3g}'):,.0f}" if pairs_per_s >= 100 else f"{pairs_per_s:.3g}"


def verdict_sentence(model: BatchModel, found: Bottleneck, about: Surroundings) -> str:
    """As `decode-bound: 2,900 of the step's 4,700 pairs/s; 6 more cores would lift it to about 4,700`."""
    loader_s, step_s = model.sides()
    batch, stage = model.times.batch, found.stage
    loader, step = show_rate(batch / loader_s), show_rate(batch / step_s)
    now, free = show_rate(model.rate()), show_rate(model.rate({stage: 0.0}))
    if found.kind == "loader":
        told = f"{stage}-bound: {now} of the step's {step} pairs/s"
    elif found.kind == "step":
        told = f"{stage}-bound: {now} of the loader's {loader} pairs/s"
    elif found.kind == "shared":
        where = "the GPU" if about.on_gpu else _cores_of(about)
        told = (
            f"{stage}-bound: {now} pairs/s, as loader ({loader}) and step ({step}) take turns on {where}, "
            f"and without {stage} {free}"
        )
    else:
        pair = [max(side, key=lambda stage: side[stage]) for side in _sides(model)]
        halved = show_rate(model.rate(dict.fromkeys(pair, 0.5)))
        return (
            f"balanced: {now} pairs/s with a loader of {loader} and a step of {step}, so one stage alone "
            f"gives little; {pair[0]} and {pair[1]} in half the time would give {halved}"
        )
    return f"{told}; {way_out(model, found, about)}"


def _cores_of(about: Surroundings, word: str = "") -> str:
    return f"{about.cores} {word}core{'s' if about.cores > 1 else ''}"


def _sides(model: BatchModel) -> tuple[Mapping[str, float], Mapping[str, float]]:
    return model.times.loader_stages, model.times.step_stages


def way_out(model: BatchModel, found: Bottleneck, about: Surroundings) -> str:
    """What to do about the stage, with what it would give."""
    stage = found.stage
    if stage == "read":
        return _disk(model, about)
    if stage == "logging":
        return _rarer_log(model, about)
    if found.kind == "shared" and not about.on_gpu and stage != "to-device":
        if about.config.views.backend == "torch" and about.loader_threads == 1 < about.cores:
            return f"--loader-threads {about.cores} gives the loader processes of its own"
        # Whatever takes the turns, more cores shorten them all; nobody measured by how much.
        twice = show_rate(2 * model.rate())
        return f"{_cores_of(about, 'more ')} would lift it to {twice} at most"
    if stage in ("decode", "augment", "loader"):
        ways = [*_loads(model, found, about), *_cores(model, found, about)]
        if ways:
            return " or ".join(ways)
    half = show_rate(model.rate({stage: 0.5}))
    return f"in half the time it would be {half}: {_switches(stage, about)}"


def _loads(model: BatchModel, found: Bottleneck, about: Surroundings) -> list[str]:
    """The best other share of the JPEG unit, where it was measured to be better."""
    now = about.decode_s_by_load.get(about.config.speed.hw_decoder_load)
    if found.stage != "decode" or not now:
        return []
    best = min(about.decode_s_by_load, key=lambda load: about.decode_s_by_load[load])
    lifted = model.rate({"decode": about.decode_s_by_load[best] / now})
    if lifted < LEAST_GAIN * model.rate():
        return []
    return [f"--hw-decoder-load {best:g} would lift it to about {show_rate(lifted)}"]


def _cores(model: BatchModel, found: Bottleneck, about: Surroundings) -> list[str]:
    """More of them for the loader, as far as its work divides over its threads."""
    share = about.divided_share
    if (about.on_gpu and found.stage == "augment") or share < LEAST_SHARE:
        return []
    threads = about.loader_threads
    divided = [stage for stage in model.times.loader_stages if stage not in ("read", "to-device")]

    def scales(more: int) -> dict[str, float]:
        """Amdahl's law."""
        return dict.fromkeys(divided, 1 - share + share * threads / (threads + more))

    def is_enough(more: int) -> bool:
        loader_s, step_s = model.sides(scales(more))
        return loader_s <= step_s * (1 + 1e-9)

    # What sixteen times as many do not reach is worth a try with twice as many.
    more = next(filter(is_enough, range(1, 16 * threads)), threads)
    lifted = show_rate(model.rate(scales(more)))
    if threads + more <= about.cores:
        return [f"--loader-threads {threads + more} would lift it to about {lifted}"]
    return [f"{more} more core{'s' if more > 1 else ''} would lift it to about {lifted}"]


def _disk(model: BatchModel, about: Surroundings) -> str:
    """How many bytes a second there are, and how many it would take."""
    read_s = model.times.loader_stages["read"]
    now = model.times.batch * about.sample_bytes / read_s / 1e6
    half = show_rate(model.rate({"read": 0.5}))
    return f"it reads {show_rate(now)} MB/s, and at {show_rate(2 * now)} MB/s it would be {half}"


def _rarer_log(model: BatchModel, about: Surroundings) -> str:
    """So many steps between two lines that the log takes a hundredth of the step."""
    steps = about.config.watch.log_steps
    rarer = math.ceil(steps * model.times.logging_s / (0.01 * model.times.step_s))
    lifted = show_rate(model.rate({"logging": steps / rarer}))
    return f"--log-steps {rarer} would lift it to about {lifted}"


def _switches(stage: str, about: Surroundings) -> str:
    """What may make a stage of the step faster and is not on yet."""
    speed, on_gpu = about.config.speed, about.on_gpu
    network = stage in ("query forward", "key forward", "backward")
    ways = []
    if stage == "to-device" and about.config.views.backend != "dali" and on_gpu:
        ways.append("--backend dali, whose views are made there")
    if network and on_gpu and speed.precision == "fp32":
        ways.append("--precision bf16")
    if network and not speed.channels_last:
        ways.append("--channels-last")
    if network and not on_gpu and about.step_threads < about.cores:
        ways.append(f"OMP_NUM_THREADS={about.cores}")
    if (network or stage == "loss") and speed.compile == "off":
        ways.append("--compile encoders" if network else "--compile step")
    if stage == "key forward" and on_gpu and not speed.side_stream:
        ways.append("--side-stream")
    if stage == "optimizer+EMA" and on_gpu and speed.fused_update == "off":
        ways.append("--fused-update on")
    if stage == "other" and on_gpu and not speed.cuda_graphs:
        ways.append("--cuda-graphs")
    if not ways:
        return "--profile FOLDER shows what it is made of"
    tuned = " (`linerate tune` times it)" if any(way.startswith(_TUNED) for way in ways) else ""
    return f"{' or '.join(ways)} may do it{tuned}"

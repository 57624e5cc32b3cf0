"""The step on 1, 2, ... ranks of this machine: how well it scales, and what its collectives send.

weak: each rank has as many images, however many ranks there are. strong: all ranks share as many.
The efficiency is the ratio of a record: n times one rank's seconds for the same pairs over those of n ranks,
the median over rounds. A projection's is its formula's. Nothing else is called efficiency.
On a CPU ranks are processes of one thread each, by torchrun and gloo; where there are GPUs enough, by NCCL.
Legend: n ranks, N images on each, B on all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from linerate.bench.contest import Bar, Contest, Count, Setting, timed_record
from linerate.bench.machine import machine, noise, probe
from linerate.bench.projection import Projected, Traffic, project
from linerate.bench.record import Record
from linerate.bench.suites.scale_rank import Group, Launched, Rank
from linerate.bench.timing import Seconds, Side, interleave
from linerate.pipeline.cores import usable_cores
from linerate.shards.errors import UserError
from linerate.train.config import TrainConfig
from linerate.train.encoder import build_encoder
from linerate.train.recipes import find_recipe

NAME = "scale"
REFERENCE = "the reference: all-gather of floats, DDP with buffers"
Mode = Literal["weak", "strong"]
MODES: tuple[Mode, ...] = ("weak", "strong")


def bench_scale(setting: Setting) -> Iterator[Record | Count]:
    """The recipe `demo` on a CPU, `in1m-v2` where there are GPUs; counts besides the rates."""
    config = find_recipe("in1m-v2" if setting.device == "cuda" else "demo").build()
    most = torch.cuda.device_count() if setting.device == "cuda" else setting.max_ranks
    if setting.size == "tiny":
        config = dataclasses.replace(
            config,
            views=dataclasses.replace(config.views, size=16),
            model=dataclasses.replace(config.model, encoder="tiny-resnet-w4"),
            dictionary=dataclasses.replace(config.dictionary, num_keys=64),
            optim=dataclasses.replace(config.optim, global_batch=16),
            bn=dataclasses.replace(config.bn, bn_group=4),
        )
    ranks = [n for n in (1, 2, 4, 8) if n <= most]
    # One BN group a rank, where the recipe has larger ones.
    bn_group = min(config.bn.bn_group, config.optim.global_batch // ranks[-1])
    config = dataclasses.replace(config, bn=dataclasses.replace(config.bn, bn_group=bn_group))
    scaling = Scaling(config, ranks)
    try:
        yield from scaling.measure(rounds=setting.rounds, min_round_s=setting.min_round_s)
    except UserError as error:
        work = scaling.describe("weak", scaling.ranks[-1])
        yield Record(name=NAME, peer=None, work=work, unit="pairs/s", refused=str(error), machine=machine())


class Scaling:
    """A recipe on several numbers of ranks. Raises UserError where its batch does not fit on one of them."""

    def __init__(self, config: TrainConfig, ranks: Sequence[int]) -> None:
        self.ranks = sorted({1, *ranks})
        self.on_gpu = torch.cuda.device_count() >= self.ranks[-1]
        # Keys change places among all images of a step, however many those are.
        self.config = dataclasses.replace(config, bn=dataclasses.replace(config.bn, shuffle_block=None))
        self.batch = config.optim.global_batch
        for num in self.ranks:
            self.config.rank_batch(num)
        self.times: dict[tuple[int, int], Seconds] = {}
        self.traffic: Traffic | None = None

    def rank_batch(self, mode: Mode, ranks: int) -> int:
        """N. Weak: what the most ranks have of the recipe's batch; so both modes meet there."""
        return self.batch // (self.ranks[-1] if mode == "weak" else ranks)

    def measure(self, *, rounds: int, min_round_s: float) -> Iterator[Record | Count]:
        """Rates of both modes, all numbers of ranks interleaved; then what a step sends."""
        with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as opened:
            groups = {num: opened.enter_context(self._started(num, Path(scratch))) for num in self.ranks}
            cells = dict.fromkeys((num, self.rank_batch(mode, num)) for mode in MODES for num in self.ranks)
            sides = {
                f"{num} {batch}": Side(run=partial(groups[num].answer, "step", batch)) for num, batch in cells
            }
            for side in sides.values():
                side.run()
            before = probe()
            times = interleave(sides, rounds=rounds, min_round_s=min_round_s)
            unrest = noise(before, probe())
            self.times = {(num, batch): times[f"{num} {batch}"] for num, batch in cells}
            yield from (self._record(mode, num, unrest) for mode in MODES for num in self.ranks)
            for num in self.ranks[1:]:
                yield from self._counts(num, groups[num].answer("count", self.rank_batch("weak", num)))

    def describe(self, mode: Mode, ranks: int) -> str:
        """The work in a line."""
        model, views = self.config.model, self.config.views
        images = (
            f"b{self.rank_batch(mode, ranks)} a rank" if mode == "weak" else f"b{self.batch} on all ranks"
        )
        where = f"NCCL on {ranks} GPUs" if self.on_gpu else f"gloo, single-threaded ranks: {ranks}"
        return f"{mode}: {images}, {model.encoder}, {views.size} px, {where}"

    def project(self, world_sizes: Sequence[int], *, link_gb_per_s: float) -> Iterator[Record]:
        """Records of more ranks by formula; their note begins with `projection`. After `measure`."""
        if self.traffic is None:
            raise UserError("a projection needs the bytes of at least two ranks; give --ranks 1 2")
        most = self.ranks[-1]
        for mode in MODES:
            for num in world_sizes:
                # Where all share the recipe's batch, each needs a whole BN group of it.
                if mode == "strong" and self.batch % (num * self.config.bn.bn_group):
                    continue
                batch = self.rank_batch("weak", most) if mode == "weak" else self.batch // num
                measured = self.times[1, self.rank_batch(mode, 1)]
                share = 1.0 if mode == "weak" else 1 / num
                found = project(
                    self.traffic.scaled(batch / self.rank_batch("weak", most)),
                    ranks=num,
                    rank_batch=batch,
                    compute_s=share * float(np.median(measured)),
                    link_gb_per_s=link_gb_per_s,
                )
                yield self._projected(mode, found, link_gb_per_s)

    @contextlib.contextmanager
    def _started(self, num: int, scratch: Path) -> Iterator[Group]:
        folder = scratch / f"ranks-{num}"
        folder.mkdir()
        # One rank needs no launcher, unless CUDA has to be hidden from it.
        alone = num == 1 and not torch.cuda.is_available()
        group: Group = (
            Rank(self.config, folder) if alone else Launched(self.config, num, folder, on_gpu=self.on_gpu)
        )
        with contextlib.closing(group):
            yield group

    def _record(self, mode: Mode, num: int, unrest: dict[str, Any]) -> Record:
        ours = self.times[num, self.rank_batch(mode, num)]
        one = self.times[1, self.rank_batch(mode, 1)]
        # As long as n times one rank would take for the same pairs.
        ideal = one if mode == "weak" else one / num
        cores = num if self.on_gpu else usable_cores()
        at_most = f"; {num} ranks on {cores} cores reach {cores / num:.2f} at most" if cores < num else ""
        contest = Contest(
            peer=f"{num} times one rank, {mode}" if num > 1 else None,
            work=self.describe(mode, num),
            unit="pairs/s",
            amount=num * self.rank_batch(mode, num),
            ours=Side(run=lambda: None),
            ranks=num,
            no_ceiling="n times one rank is what n are held against",
            note=f"the ratio is the efficiency{at_most}" if num > 1 else None,
        )
        times = {"ours": ours} | ({"theirs": ideal} if num > 1 else {})
        return timed_record(NAME, contest, times=times, noise=unrest, suite="")

    def _counts(self, num: int, found: dict[str, Any]) -> Iterator[Count]:
        calls, filled = found["calls"], found["bytes"]
        batch = self.rank_batch("weak", num)
        reference = reference_traffic(self.config, ranks=num, rank_batch=batch)
        gradients = found["gradient_bytes"]
        images, keys = filled.get("alltoall_base_", 0), filled.get("_allgather_base_", 0)
        self.traffic = Traffic(gradient_bytes=gradients, image_bytes=images, key_bytes=keys // num)
        broadcasts = calls.get("broadcast_", 0)
        none, few = Bar(0, of="ours", at_most=True), Bar(4, of="ours", at_most=True)
        besides = sum(calls.values()) - found["gradient_calls"]
        for unit, ours, theirs, bar in (
            ("collectives besides gradients", besides, len(reference) + 1, few),
            ("buffer broadcasts", broadcasts, 1, none),
            ("bytes of images", images, reference["images"], None),
            ("bytes of keys", keys, 2 * reference["keys"], None),
            ("bytes of buffers", filled.get("broadcast_", 0), reference["buffers"], none),
            ("bytes of gradients", gradients, gradients, None),
        ):
            yield Count(
                peer=REFERENCE,
                work=f"{self.describe('weak', num)}; one step",
                unit=unit,
                ours=ours,
                theirs=theirs,
                bar=bar,
                ranks=num,
                note="of a rank; bytes are those of the buffers that a collective fills",
            )

    def _projected(self, mode: Mode, found: Projected, link_gb_per_s: float) -> Record:
        batch = found.pairs // found.ranks
        model, views = self.config.model, self.config.views
        return Record(
            name=NAME,
            peer=f"projection: {found.ranks} times one rank, {mode}",
            work=f"{mode}: b{batch} a rank, {model.encoder}, {views.size} px, {found.ranks} ranks, projected",
            unit="pairs/s",
            ours=found.pairs_per_s,
            ratio=found.efficiency,
            ratio_low=found.efficiency,
            ratio_high=found.efficiency,
            ranks=found.ranks,
            note=f"projection: {1e3 * found.compute_s:.3g} ms of one rank as measured, then "
            f"{found.sent_bytes / 1e6:.3g} MB at {link_gb_per_s:g} GB/s, nothing overlapped",
        )


def reference_traffic(config: TrainConfig, *, ranks: int, rank_batch: int) -> dict[str, int]:
    """Bytes that each kind of collective of facebookresearch/moco fills on a rank; keys travel twice.

    Images as floats and the keys by all-gather, to shuffle and to put them back; the keys again to be
    enqueued; the permutation and, before each forward of DDP, the queue and all of BatchNorm's buffers by
    broadcast. K divides by nothing here.
    """
    model, views = config.model, config.views
    with torch.device("meta"):
        encoder = build_encoder(model.encoder, dim=model.dim, head=model.head, stem=model.stem)
    of_bn = sum(
        buffer.numel() * buffer.element_size()
        for module in encoder.modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
        for buffer in module.buffers()
    )
    queue = config.dictionary.num_keys * model.dim * 4 + 8
    batch = ranks * rank_batch
    return {
        "images": batch * 3 * views.size**2 * 4,
        "keys": batch * model.dim * 4,
        "permutation": batch * 8,
        "buffers": 2 * of_bn + queue,
    }

"""The whole run from files to steps against lightly's: its dataset, its transform, a DataLoader, its MoCo."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from linerate.bench.contest import Bar, Contest, Disagreement, Setting
from linerate.bench.images import ImageFolder
from linerate.bench.peers import missing_peer, open_peer
from linerate.bench.suites.pipeline import Stages
from linerate.bench.suites.step import require_lightlys_losses
from linerate.bench.timing import Side
from linerate.pipeline.cores import usable_cores
from linerate.shards.catalog import Catalog
from linerate.train.config import TrainConfig

# Batches that a DataLoader keeps ready for each worker.
PREFETCH = 2


def against_lightlys_run(
    config: TrainConfig, catalog: Catalog, images: ImageFolder, *, setting: Setting, budget_s: float
) -> Iterator[Contest]:
    """Our loader and step on the shards, and lightly's on the folder that was packed, as many pairs each.

    Before each round both use up what lies ready, so that the clock sees what they make meanwhile.
    """
    missing = missing_peer("lightly")
    num_workers = usable_cores()
    with contextlib.ExitStack() as opened:
        stages = opened.enter_context(contextlib.closing(Stages(config, catalog)))
        ask = None if missing else opened.enter_context(open_peer("lightly"))
        num = stages.fit(budget_s, setting.rounds)
        warm = max(1, PREFETCH * num_workers)
        shape: dict[str, Any] = {
            "encoder": config.model.encoder,
            "num_keys": config.dictionary.num_keys,
            "size": config.views.size,
            "batch": stages.batch,
            "device": stages.device,
            "num_threads": torch.get_num_threads(),
        }

        def train(num_batches: int) -> None:
            assert ask is not None
            ready = {"augmentation": config.views.augmentation, "num_workers": num_workers}
            shapes = ask(
                "lightly_train",
                folder=str(images.root),
                num_batches=num_batches,
                autocast=stages.on_gpu,
                **ready,
                **shape,
            )
            wanted = [stages.batch, 3, config.views.size, config.views.size]
            if shapes != [wanted] * 2:
                raise Disagreement(f"lightly's views are {shapes}, ours {wanted} each")

        def agree() -> str:
            assert ask is not None
            train(1)
            small = {"batch": min(stages.batch, 16), "num_keys": min(config.dictionary.num_keys, 4096)}
            return f"{require_lightlys_losses(ask, {**shape, **small})}; the shapes of the views"

        yield Contest(
            peer="lightly: its dataset and transform, a DataLoader, its MoCo",
            work=f"loader and step: {stages.describe()}",
            unit="pairs/s",
            amount=num * stages.batch,
            ours=stages.sides(num)["both"],
            theirs=None if missing else Side(run=partial(train, num), prepare=partial(train, warm)),
            missing=missing,
            agree=agree,
            bar=Bar(5.0, full_size=stages.on_gpu and setting.size == "full"),
            no_ceiling="loader and step alone are measured above",
            note=f"theirs reads the files of the folder with {num_workers} workers and draws by itself",
        )

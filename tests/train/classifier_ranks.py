"""Both protocols on two ranks; see rank_server.py."""

from pathlib import Path

import torch

from linerate.shards.catalog import Catalog
from linerate.train.evaluate.classifier_run import RunOptions, run_classifiers
from linerate.train.evaluate.labelled import open_labelled_split


def run_both(train: Catalog, test: Catalog, out: Path) -> list[dict]:
    """The results of a linear probe and of a fine-tuning, in this order."""
    from tests.train.test_classifier import FINETUNE, LINEAR, calibrated

    torch.set_num_threads(1)
    labelled = open_labelled_split(train, test)
    outcomes = [
        run_classifiers(
            config, calibrated(labelled), labelled, RunOptions(out=out / config.protocol, num_threads=1)
        )
        for config in (LINEAR, FINETUNE)
    ]
    return [{"world_size": one.world_size, **one.results[0]} for one in outcomes]


def main(train: str, test: str, out: str) -> None:
    found = run_both(Catalog.load(train), Catalog.load(test), Path(out))
    assert {one["world_size"] for one in found} == {2}

"""Both protocols and kNN on two ranks; see rank_server.py."""

import json
import os
from pathlib import Path

import torch

from linerate.shards.catalog import Catalog
from linerate.train.evaluate.classifier_run import RunOptions, run_classifiers
from linerate.train.evaluate.classify import open_ranks
from linerate.train.evaluate.knn import knn_accuracy_over_ranks
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


def knn_over_ranks(out: Path) -> None:
    """Write what two ranks find that hold 25 and 16 of 41 train rows, and 7 and 6 of 13 test rows."""
    from tests.train.test_knn import RANKS_CASES, blobs

    rank = int(os.environ["RANK"])
    open_ranks(bf16=False).__enter__()
    (train, labels), (test, wanted) = blobs(41, seed=1), blobs(13, seed=2)
    train_rows, test_rows = (slice(0, 25), slice(0, 7)) if rank == 0 else (slice(25, 41), slice(7, 13))
    shares = train[train_rows], labels[train_rows], test[test_rows], wanted[test_rows]
    found = [
        knn_accuracy_over_ranks(*shares, k=k, temperature=t, num_classes=5, rank=rank, world_size=2)
        for k, t in RANKS_CASES
    ]
    (out / f"knn-{rank}.json").write_text(json.dumps(found))


def main(train: str, test: str, out: str) -> None:
    found = run_both(Catalog.load(train), Catalog.load(test), Path(out))
    assert {one["world_size"] for one in found} == {2}
    knn_over_ranks(Path(out))

"""The monitor's memory as --dry-run tells it: the sets, the crops, one forward, and where they are added."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from tests.train.small import SMALL
from torch import nn

from linerate.__main__ import main
from linerate.pipeline.evaluation_views import DECODED_BYTES, batch_within
from linerate.pipeline.host_memory import DECODED_BATCHES, PHOTO, PIPELINE_BYTES, SampleSize
from linerate.shards.catalog import Catalog
from linerate.train.config import Speed, TrainConfig, Watch
from linerate.train.encoder import build_encoder
from linerate.train.monitor_memory import (
    ON_DEVICE,
    ON_HOST,
    add_monitor,
    forward_bytes,
    has_monitor,
    num_judged,
)
from linerate.train.recipes import RECIPES

NOTHING = {"activations": 0, "logits": 0, "total": 0}


def _added(config: TrainConfig, sample: SampleSize = PHOTO, **step: int) -> tuple[int, int]:
    """What the monitor adds to the device's table and to the host's, of a data set of 1,000 images."""
    device, host = add_monitor(NOTHING | step, {"libraries": 5, "total": 5}, config, sample, num_samples=1000)
    assert host is not None
    assert (device["total"], host["total"]) == (device[ON_DEVICE], 5 + host[ON_HOST])
    return device[ON_DEVICE], host[ON_HOST]


def _config(**watch: Any) -> TrainConfig:
    return dataclasses.replace(RECIPES["in1m-v1"].build(), watch=Watch(knn_epochs=1, **watch))


def test_dali_s_batches_take_64_mib_decoded_or_one_image() -> None:
    assert batch_within(256, decoded_bytes=PHOTO.decoded_bytes) == DECODED_BYTES // PHOTO.decoded_bytes == 124
    assert batch_within(256, decoded_bytes=100) == 256
    assert batch_within(256, decoded_bytes=2 * DECODED_BYTES) == 1
    config = dataclasses.replace(_config(), speed=Speed(loader_threads=1))
    for sample, batch in ((PHOTO, 124), (SampleSize(num_bytes=10**7, pixels=2**25), 1)):
        # Batches decoded, six to be, four of crops; what a decoder of a progressive image needs.
        decoded, jpegs, crops = DECODED_BATCHES * 3 * sample.pixels, 6 * sample.num_bytes, 4 * 3 * 224 * 224
        decoder = 2 * 3 * sample.pixels
        assert _added(config, sample)[1] == PIPELINE_BYTES + batch * (decoded + jpegs + crops) + decoder


def test_features_of_both_sets_lie_on_the_device() -> None:
    few, many = (
        _added(_config(knn_train="A", knn_test="B", knn_limit=limit))[0] for limit in (70_000, 80_000)
    )
    # From 65,536 rows on the chunk of similarities stays as it is.
    assert many - few == 2 * 10_000 * 2048 * 4
    narrow, wide = (
        _added(_config(knn_train="A", knn_limit=70_000, knn_features=features))[0]
        for features in ("projection", "backbone")
    )
    assert wide - narrow == 2 * 70_000 * (2048 - 128) * 4


def test_only_what_a_step_has_not_taken_already_is_added() -> None:
    alone, _ = _added(_config())
    assert _added(_config(), activations=alone - 100, logits=40)[0] == 60
    assert _added(_config(), activations=alone, logits=1)[0] == 0


def test_the_sets_are_no_larger_than_the_limit_and_the_shards() -> None:
    assert num_judged(Watch(), 1000) == (900, 100)
    assert num_judged(Watch(knn_limit=500), 1000) == (500, 100)
    assert num_judged(Watch(knn_test="B", knn_limit=5000), 1000) == (1000, 5000)
    assert num_judged(Watch(knn_train="A", knn_limit=5000), 1000) == (5000, 5000)


def test_a_forward_holds_its_widest_layer_and_a_shortcut() -> None:
    with torch.device("meta"):
        encoder = build_encoder("tiny-resnet-w4", dim=8, stem="cifar")
    first = next(module for module in encoder.modules() if isinstance(module, nn.Conv2d))
    layer = first.out_channels * 16 * 16 * 4
    # The layers at full size: two of its outputs at hand, and the shortcut's.
    assert forward_bytes(encoder, size=16) == 3 * layer


def test_there_is_no_part_without_a_monitor(shards: Catalog, unlabelled_shards: Catalog) -> None:
    assert not has_monitor(Watch(), shards)
    assert has_monitor(Watch(knn_epochs=1), shards)
    assert has_monitor(Watch(knn_epochs=1), None)
    assert not has_monitor(Watch(knn_epochs=1), unlabelled_shards)
    assert has_monitor(Watch(knn_epochs=1, knn_train="A"), unlabelled_shards)


def test_pillow_decodes_an_image_a_thread() -> None:
    one, two = (
        _added(dataclasses.replace(SMALL, speed=dataclasses.replace(SMALL.speed, loader_threads=num)))[1]
        for num in (1, 2)
    )
    assert two - one == PHOTO.decoded_bytes


def test_a_dry_run_names_the_monitor_in_both_sums(
    capsys: pytest.CaptureFixture[str], shards: Catalog
) -> None:
    argv = ["train", "demo", "--dry-run", "--shards", str(shards.root), "--global-batch", "16", "--lr", "0.1"]
    told = {}
    for epochs in ("0", "2"):
        assert main([*argv, "--bn-group", "4", "--json", "--knn-epochs", epochs]) == 0
        told[epochs] = json.loads(capsys.readouterr().out)
    for table, name in (("memory_bytes", ON_DEVICE), ("host_memory_bytes", ON_HOST)):
        without, with_it = told["0"][table], told["2"][table]
        assert with_it["total"] == without["total"] + with_it[name]
        assert with_it == without | {name: with_it[name], "total": with_it["total"]}
    assert told["2"]["host_memory_bytes"][ON_HOST] > PIPELINE_BYTES

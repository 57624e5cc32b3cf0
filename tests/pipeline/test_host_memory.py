import dataclasses
import os

import numpy as np
import pytest

from linerate.pipeline.host_memory import (
    LIBRARY_BYTES,
    PHOTO,
    PIPELINE_BYTES,
    SampleSize,
    largest_sample,
    pool_dali_memory,
    predict_host_memory,
)

OPTIONS = {"size": 224, "rank_batch": 32, "rank_lanes": 8, "num_threads": 4, "prefetch": 2}
SIZES = np.full(100, 10_000)


def predict(sample: SampleSize = PHOTO, **options):
    given = {"shard_sizes": SIZES, "backend": "dali", "on_gpu": False} | OPTIONS | options
    return predict_host_memory(sample, **given)


def test_the_parts_are_what_the_formulas_say_and_sum_to_the_total():
    parts = predict()
    assert parts["decoded images"] == 2 * 32 * 3 * PHOTO.pixels
    assert parts["decoders"] == 4 * 2 * 3 * PHOTO.pixels
    assert parts["JPEG bytes"] == 6 * 32 * PHOTO.num_bytes
    assert parts["views"] == 2 * 4 * 32 * 3 * 224 * 224
    assert parts["indexes"] == 80 * 10_000 * 44
    assert (parts["libraries"], parts["pipeline"]) == (LIBRARY_BYTES, PIPELINE_BYTES)
    assert parts["total"] == sum(size for name, size in parts.items() if name != "total")


def test_a_gpu_decodes_in_its_own_memory():
    assert not {"decoded images", "decoders"} & predict(on_gpu=True).keys()
    assert "JPEG bytes" not in predict(backend="synthetic")


def test_every_worker_of_torch_decodes_a_batch_of_its_own():
    assert predict(backend="torch")["decoded images"] == 4 * 32 * 3 * PHOTO.pixels


def test_few_shards_have_few_indexes():
    assert predict(shard_sizes=np.array([50, 10]))["indexes"] == 2 * 50 * 44


@pytest.mark.parametrize("backend", ["webdataset", "ffcv"])
def test_pipelines_of_others_are_not_foreseen(backend):
    assert predict(backend=backend) is None


def test_the_largest_sample_is_of_the_catalogs_maxima(catalog):
    odd = dataclasses.replace(catalog, max_height=10, max_width=20, max_sample_bytes=30)
    assert largest_sample(odd) == SampleSize(30, 200)
    assert largest_sample(odd).decoded_bytes == 600


def test_dali_s_own_pool_is_for_all_but_small_buffers_unless_the_user_has_said_otherwise(monkeypatch):
    name = "DALI_MALLOC_POOL_THRESHOLD"
    monkeypatch.delenv(name, raising=False)
    pool_dali_memory()
    assert os.environ[name] == "64k"
    monkeypatch.setenv(name, "1M")
    pool_dali_memory()
    assert os.environ[name] == "1M"

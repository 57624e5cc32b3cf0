"""Run by a test: epochs by ffcv over 18 samples, and what must be true of them.

python ffcv_worker.py SHARDS
"""

import sys

import numpy as np
import torch

from linerate.pipeline.loader import open_views
from linerate.pipeline.recipe import v2
from linerate.shards.catalog import Catalog


def ids(batches):
    return [batch.sample_id.tolist() for batch in batches]


def main(root: str) -> None:
    catalog, threads = Catalog.load(root), torch.get_num_threads()
    settings = {"seed": 1, "global_batch": 6, "num_lanes": 2, "num_threads": 1}
    loader = open_views(catalog, recipe=v2(size=16), backend="ffcv", **settings)
    batches = list(loader.epoch(0))
    assert torch.get_num_threads() == threads
    assert len(batches) == 3
    assert sorted(one for batch in ids(batches) for one in batch) == list(range(18))
    labels = np.concatenate([catalog.shard_index(shard).label for shard in range(catalog.num_shards)])
    for views in batches:
        assert views.query.shape == views.key.shape == (6, 3, 16, 16)
        assert views.query.is_contiguous(memory_format=torch.channels_last)
        assert views.query.dtype == torch.uint8
        assert views.position.tolist() == views.sample_id.tolist()
        assert views.label.tolist() == labels[views.position].tolist()
        assert not torch.equal(views.query, views.key)
    # The order follows from the seed, a start step skips, and a batch is the caller's own.
    held = [views.query.clone() for views in batches]
    assert ids(loader.epoch(0, start_step=1)) == ids(batches)[1:]
    assert all(torch.equal(views.query, copy) for views, copy in zip(batches, held, strict=True))
    left_early = loader.epoch(1)
    assert ids([next(left_early)]) != ids(batches)[:1]
    left_early.close()
    assert len(list(loader.epoch(2))) == 3
    loader.close()
    print("all asserted")


if __name__ == "__main__":
    main(sys.argv[1])

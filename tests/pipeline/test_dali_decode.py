"""The decoder of the graph alone, and how much of it a GPU's JPEG unit is told to do."""

import numpy as np
import pytest
import torch

from linerate.pipeline import dali_graph
from linerate.pipeline.dali_views import decoded
from linerate.pipeline.loader import open_views
from linerate.pipeline.recipe import v2
from linerate.pipeline.torch_views import decode_rgb


def encoded(*samples):
    return [np.frombuffer(sample.jpeg, dtype=np.uint8) for sample in samples]


def test_batch_after_batch_is_decoded_to_pillows_pixels_and_then_the_end_comes(make_sample):
    batches = [encoded(make_sample(0), make_sample(1, height=30)), encoded(make_sample(2, mode="L"))]
    found = list(decoded(batches, batch=2))
    assert [len(images) for images in found] == [2, 1]
    for images, jpegs in zip(found, batches, strict=True):
        for image, jpeg in zip(images, jpegs, strict=True):
            ours = torch.from_dlpack(image).int()
            assert (ours - decode_rgb(jpeg).permute(1, 2, 0).int()).abs().max() <= 4


def test_what_does_not_decode_is_an_error(make_sample):
    good = make_sample(0)
    with pytest.raises(RuntimeError, match="decod"):
        list(decoded([encoded(type(good)(good.jpeg[: len(good.jpeg) // 2], 48, 64))], batch=1))


@pytest.mark.parametrize(("asked", "got"), [({}, 0.65), ({"hw_decoder_load": 0.9}, 0.9)])
def test_the_load_of_the_jpeg_unit_reaches_the_graph(catalog, monkeypatch, asked, got):
    seen = []
    decode = dali_graph.decode

    def spy(jpegs, *, device, hw_decoder_load):
        seen.append(hw_decoder_load)
        return decode(jpegs, device=device, hw_decoder_load=hw_decoder_load)

    monkeypatch.setattr(dali_graph, "decode", spy)
    loader = open_views(
        catalog, recipe=v2(size=8), seed=0, global_batch=8, num_lanes=4, num_threads=1, **asked
    )
    next(loader.epoch(0))
    loader.close()
    assert seen == [got]

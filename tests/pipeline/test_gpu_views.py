"""What DALI does on a GPU; each test names its twin on the CPU, which every machine runs."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.needs_gpu import needs_gpu
from tests.pipeline.encoded_samples import cut, encoded, image_fetch

from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.evaluation_views import open_images
from linerate.pipeline.loader import open_backend, open_views
from linerate.pipeline.recipe import find_recipe, v2
from linerate.pipeline.undecodable import UndecodableImages

dali_views = pytest.importorskip(
    "linerate.pipeline.dali_views", reason="no DALI: its GPU graph stays untested"
)

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"
SIZE = 24
LOADS = (0.0, 0.65, 1.0)


@pytest.fixture(scope="module")
def jpegs(make_sample):
    return [make_sample(i, height=40 + 3 * i, width=90 - 2 * i).jpeg for i in range(24)]


def on_gpu(batch=6, *, recipe="v2", **options):
    settings = {"num_threads": 2, "prefetch": 2} | options
    return dali_views.DaliViews(
        recipe=find_recipe(recipe, size=SIZE), seed=5, batch=batch, device="cuda", **settings
    )


def pixels(batches):
    batches = list(batches)
    return torch.cat([b.query for b in batches]), torch.cat([b.key for b in batches])


@needs_gpu("that DALI's graph runs on a GPU, and that a batch is nobody else's while it is held")
def test_the_graph_runs_and_its_views_stay_what_they_are_while_they_are_held(jpegs):
    """Twin: test_backends.py::test_views_stay_what_they_are_while_they_are_held."""
    held = []
    for batch in on_gpu(2).run(image_fetch(jpegs, 2), range(12), epoch=0):
        # The copy waits behind this on torch's stream, while DALI goes on with its next batches.
        torch.cuda._sleep(10_000_000)
        held.append((batch.query, batch.query.clone()))
        assert (batch.query.shape, batch.query.dtype) == ((2, 3, SIZE, SIZE), torch.uint8)
        assert batch.query.is_cuda
        assert batch.query.is_contiguous(memory_format=torch.channels_last)
    assert len(held) == 12
    assert all(torch.equal(view, copy) for view, copy in held)


@needs_gpu("that a GPU makes the same views whatever the batch, the threads and the prefetch")
def test_a_gpu_makes_the_same_views_whatever_the_batch_threads_and_prefetch(jpegs):
    """Twin: test_backends.py::test_dali_makes_the_same_views_whatever_the_batch_threads_and_prefetch."""
    reference = pixels(on_gpu().run(image_fetch(jpegs, 6), range(4), epoch=2))
    for batch, num_threads, prefetch in ((1, 1, 1), (12, 4, 3), (24, 1, 1)):
        views = on_gpu(batch, num_threads=num_threads, prefetch=prefetch)
        again = pixels(views.run(image_fetch(jpegs, batch), range(24 // batch), epoch=2))
        assert all(map(torch.equal, reference, again))


@needs_gpu("that a GPU's views by the same draws are torchvision's, per operation and whole, v1 to v3")
@pytest.mark.parametrize("recipe", ["v1", "v2", "v3"])
def test_every_operation_and_the_recipe_keep_their_bounds_on_a_gpu(make_sample, recipe):
    """Twin: test_parity.py::test_every_operation_and_the_recipe_keep_their_bounds, form `operators`."""
    from linerate.pipeline.parity import measure_parity

    # PNG, which the operations are compared on, decodes on a GPU too; CMYK JPEG does not everywhere.
    samples = [make_sample(i, height=90 + i, width=120 - i, mode="L" if i == 2 else "RGB") for i in range(3)]
    batch = encoded([one.jpeg for one in samples])
    found = measure_parity(batch, recipe=find_recipe(recipe, size=64), device="cuda")
    assert [one for one in found if not one.met] == []


@needs_gpu("that v2 on a GPU lies within half a grey level of torchvision on real photos")
@pytest.mark.data
def test_v2_on_real_photos_lies_within_half_a_grey_level_on_a_gpu():
    """Twin: test_parity.py::test_v2_on_real_photos_lies_within_half_a_grey_level."""
    from linerate.pipeline.parity import measure_parity

    if not PHOTOS.is_dir():
        pytest.skip("needs shared/data/photos beside the repository; real photos on a GPU stay untested")
    photos = sorted(PHOTOS.rglob("*.[jJ]*"))[::50]
    found = measure_parity(encoded([p.read_bytes() for p in photos]), recipe=find_recipe("v2"), device="cuda")
    assert [one for one in found if not one.met] == []


@needs_gpu("that the JPEG unit's pixels are the CPU decoder's while the GPU is busy with something else")
@pytest.mark.parametrize("hw_decoder_load", LOADS)
def test_the_jpeg_unit_gives_the_cpus_pixels_under_a_busy_stream(make_sample, hw_decoder_load):
    """Twin: test_dali_decode.py::test_batch_after_batch_is_decoded_to_pillows_pixels_...

    Chroma at half size tells: without jpeg_fancy_upsampling the unit repeats it, the CPU interpolates.
    """
    jpegs = [make_sample(i, height=200 + 8 * i, width=320 - 8 * i).jpeg for i in range(32)]
    batches = [[np.frombuffer(jpeg, dtype=np.uint8) for jpeg in jpegs]] * 4
    truth = [
        torch.from_dlpack(image).clone()
        for image in next(dali_views.decoded(batches[:1], batch=len(jpegs), num_threads=2))
    ]
    busy = torch.randn(2048, 2048, device="cuda")
    for images in dali_views.decoded(
        batches, batch=len(jpegs), device="cuda", num_threads=2, hw_decoder_load=hw_decoder_load
    ):
        for _ in range(20):
            busy = torch.tanh(busy @ busy)
        for ours, theirs in zip(images.as_cpu(), truth, strict=True):
            apart = (torch.from_dlpack(ours).int() - theirs.int()).abs()
            assert apart.float().mean() < 0.5
            assert apart.max() <= 4


@needs_gpu("that a GPU pipeline goes on after an image that does not decode, in the unit and beside it")
@pytest.mark.parametrize("hw_decoder_load", LOADS)
def test_a_gpu_goes_on_after_a_bad_image(jpegs, hw_decoder_load):
    """Twin: test_backends.py::test_images_that_do_not_decode_are_named_and_the_object_lives_on."""
    views, seen = on_gpu(hw_decoder_load=hw_decoder_load), []
    with pytest.raises(UndecodableImages, match="000000000113"):
        seen.extend(views.run(image_fetch(cut(jpegs, 13), 6), range(4), epoch=0))
    assert len(seen) == 2
    good = image_fetch(jpegs, 6)
    expected = pixels(on_gpu(hw_decoder_load=hw_decoder_load).run(good, range(4), epoch=0))
    assert all(map(torch.equal, pixels(views.run(good, range(4), epoch=0)), expected))


@needs_gpu("that a bad sample in shards is replaced, and counted, with DALI on a GPU")
def test_a_bad_sample_in_shards_is_replaced_on_a_gpu(make_shards, make_sample):
    """Twin: test_bad_samples.py, backend dali."""
    samples = [make_sample(i) for i in range(24)]
    samples[5] = type(samples[5])(samples[5].jpeg[: len(samples[5].jpeg) // 2], 48, 64)
    found = []
    loader = open_views(
        make_shards([samples[:12], samples[12:]]),
        recipe=v2(size=SIZE),
        device="cuda",
        seed=1,
        global_batch=8,
        num_lanes=2,
        num_threads=2,
        bad_share=0.2,
        on_bad=found.append,
    )
    batches = list(loader.epoch(0))
    assert len(batches) == 3
    assert loader.replacements.num_replaced == 1
    assert [one.key for one in found] == ["in/5.jpg"]
    assert 5 not in torch.cat([batch.position for batch in batches])


@needs_gpu("that synthetic views lie on the device and are made once")
def test_synthetic_views_are_made_once_and_stay_on_the_device(catalog):
    """Twin: test_loader.py, backend synthetic."""
    loader = open_views(
        catalog, recipe=v2(size=8), backend="synthetic", device="cuda", seed=1, global_batch=8, num_lanes=4
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        places = [(views.query.data_ptr(), views.query.is_cuda) for views in loader.epoch(0)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(places) == 5
    assert len(set(places)) == 2
    assert all(is_cuda for _, is_cuda in places)


@needs_gpu("that a resumed run gets the very pixels of the run that went through, on a GPU")
def test_a_restart_and_another_world_size_give_the_same_views_on_a_gpu(catalog):
    """Twin: test_loader.py::test_every_world_size_and_restart_gives_the_same_views."""
    how = {"recipe": v2(size=16), "device": "cuda", "seed": 1, "global_batch": 8, "num_lanes": 4}
    alone = list(open_views(catalog, **how).epoch(1))
    resumed = open_views(catalog, **how).epoch(1, start_step=3)
    for views, again in zip(alone[3:], resumed, strict=True):
        assert torch.equal(views.query, again.query)
        assert torch.equal(views.key, again.key)
    ranks = [list(open_views(catalog, **how, rank=rank, world_size=2).epoch(1)) for rank in range(2)]
    for whole, left, right in zip(alone, *ranks, strict=True):
        assert torch.equal(torch.cat([left.query, right.query]), whole.query)
        assert torch.equal(torch.cat([left.key, right.key]), whole.key)


@needs_gpu("that the torch backend brings its views to a GPU unchanged")
def test_torchvisions_views_reach_the_gpu_as_they_were(catalog):
    """Twin: test_loader.py::test_every_world_size_and_restart_gives_the_same_views, backend torch."""
    how = {"recipe": v2(size=16), "backend": "torch", "seed": 1, "global_batch": 8, "num_threads": 1}
    here, there = (
        list(itertools.islice(open_views(catalog, device=device, **how).epoch(0), 2))
        for device in ("cpu", "cuda")
    )
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.query, other.query.cpu())
        assert other.key.is_cuda


@needs_gpu("that a GPU's decoder takes an odd JPEG (gray, progressive, odd sizes) as the CPU's does")
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_gray_and_odd_sizes_decode_on_a_gpu_as_on_a_cpu(make_sample, mode):
    """Twin: test_backends.py::test_gray_and_cmyk_jpegs_become_rgb."""
    batch = encoded([make_sample(i, height=31 + i, width=47 + i, mode=mode).jpeg for i in range(4)])

    def fetch(step: int) -> EncodedBatch:
        return batch

    recipe = find_recipe("v1", size=SIZE)
    ours, truth = (
        pixels(
            open_backend(name, recipe=recipe, seed=5, batch=4, device=device, num_threads=1).run(
                fetch, range(1), epoch=0
            )
        )
        for name, device in (("dali", "cuda"), ("torch", "cpu"))
    )
    for one, other in zip(ours, truth, strict=True):
        assert (one.cpu().int() - other.int()).abs().float().mean() < 1.0


@needs_gpu("that a GPU's centre crops are those of the CPU")
def test_a_gpus_centre_crops_are_the_cpus(make_shards, make_sample):
    """Twin: test_evaluation_views.py::test_dalis_pixels_are_torchvisions_to_half_a_level."""
    shapes = [(300, 400), (400, 300), (257, 411), (64, 48), (20, 500)]
    catalog = make_shards([[make_sample(i, height=h, width=w) for i, (h, w) in enumerate(shapes)]])
    here, there = (
        torch.cat(
            [b.images.cpu() for b in open_images(catalog, size=224, resize=256, batch=2, device=device)]
        )
        for device in ("cpu", "cuda")
    )
    assert (here.int() - there.int()).abs().float().mean() < 1.0

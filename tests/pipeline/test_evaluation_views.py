import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from linerate.pipeline import evaluation_views
from linerate.pipeline.evaluation_views import decode_rgb, open_images
from linerate.pipeline.reader import ShardReader
from linerate.shards.errors import UserError

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"


def by_torchvision(jpeg: np.ndarray, *, size: int, resize: int) -> torch.Tensor:
    image = Image.open(io.BytesIO(jpeg.tobytes())).convert("RGB")
    image = v2.CenterCrop(size)(v2.Resize(resize, interpolation=v2.InterpolationMode.BILINEAR)(image))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


BACKENDS = pytest.mark.parametrize("backend", ["dali", "torch"])


@BACKENDS
def test_every_sample_comes_once_in_position_order_with_a_short_last_batch(catalog, backend):
    batches = list(open_images(catalog, size=16, resize=20, batch=16, num_threads=2, backend=backend))
    assert [len(b.images) for b in batches] == [16, 16, 9]
    assert torch.cat([b.position for b in batches]).tolist() == list(range(41))
    assert torch.cat([b.sample_id for b in batches]).tolist() == list(range(41))
    assert torch.cat([b.label for b in batches]).tolist() == [i % 3 for i in range(41)]


@pytest.mark.parametrize(("size", "resize"), [(16, 20), (32, 32), (37, 100)])
def test_pillows_pixels_are_torchvisions(catalog, size, resize):
    jpegs = ShardReader(catalog).read(np.arange(41)).jpegs
    batch = next(open_images(catalog, size=size, resize=resize, batch=41, num_threads=2, backend="torch"))
    for image, jpeg in zip(batch.images, jpegs, strict=True):
        assert torch.equal(image, by_torchvision(jpeg, size=size, resize=resize))


def require_near(catalog, *, size, resize, num):
    """DALI's crops lie at most a level from torchvision's, half a level on average, at the edges too."""
    jpegs = ShardReader(catalog).read(np.arange(num)).jpegs
    batches = list(open_images(catalog, size=size, resize=resize, batch=num, num_threads=2))
    images = torch.cat([batch.images for batch in batches])[:num]
    assert len(images) == num
    for image, jpeg in zip(images, jpegs, strict=True):
        off = (image.int() - by_torchvision(jpeg, size=size, resize=resize).int()).abs().float()
        assert off.max() <= 1
        assert off.mean() <= 0.5
        edges = off[:, [0, -1], :].mean(), off[:, :, [0, -1]].mean()
        assert max(edges) <= 0.5


@pytest.mark.parametrize(("size", "resize"), [(16, 20), (32, 32), (37, 100), (224, 256)])
def test_dalis_pixels_are_torchvisions_to_half_a_level(make_shards, make_sample, size, resize):
    shapes = [(300, 400), (400, 300), (257, 411), (64, 48), (20, 500), (2, 3), (1, 1), (256, 256)]
    samples = [make_sample(i, height=h, width=w) for i, (h, w) in enumerate(shapes)]
    require_near(make_shards([samples]), size=size, resize=resize, num=len(samples))


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="no ../shared/data: the crops of real photos stay untested")
def test_dalis_crops_of_real_photos_are_torchvisions_to_half_a_level(make_shards, make_sample):
    samples = []
    for path in sorted(PHOTOS.glob("*/*"))[::40]:
        with Image.open(path) as image:
            if image.format == "JPEG":
                samples.append(type(make_sample(0))(path.read_bytes(), image.height, image.width))
    assert len(samples) > 8
    require_near(make_shards([samples]), size=224, resize=256, num=len(samples))


def test_a_dali_crop_is_the_centre_and_not_the_whole(make_shards, make_sample):
    """Without the window the mean would be some ten levels off: the bound above can fail."""
    catalog = make_shards([[make_sample(0, height=300, width=400)]])
    (jpeg,) = ShardReader(catalog).read(np.arange(1)).jpegs
    crop = next(open_images(catalog, size=64, resize=256, batch=1)).images[0]
    whole = by_torchvision(jpeg, size=64, resize=64)
    assert (crop.int() - whole.int()).abs().float().mean() > 3


@BACKENDS
def test_images_are_uint8_channels_last(catalog, backend):
    images = next(open_images(catalog, size=16, resize=16, batch=4, backend=backend)).images
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)


@BACKENDS
def test_chosen_positions_come_in_the_order_chosen(catalog, backend):
    every = next(open_images(catalog, size=16, resize=16, batch=41, backend=backend))
    chosen = list(
        open_images(catalog, size=16, resize=16, batch=2, positions=np.array([30, 2, 17]), backend=backend)
    )
    assert torch.cat([b.position for b in chosen]).tolist() == [30, 2, 17]
    assert torch.equal(torch.cat([b.images for b in chosen]), every.images[[30, 2, 17]])
    none = np.empty(0, np.int64)
    assert list(open_images(catalog, size=16, resize=16, batch=2, positions=none, backend=backend)) == []


@BACKENDS
def test_grayscale_and_cmyk_become_rgb(make_shards, make_sample, backend):
    gray, cmyk, rgb = (make_sample(3, height=32, width=32, mode=mode) for mode in ("L", "CMYK", "RGB"))
    catalog = make_shards([[gray, cmyk, rgb]])
    images = next(open_images(catalog, size=32, resize=32, batch=3, backend=backend)).images
    assert torch.equal(images[0, 0], images[0, 1])
    assert (images[1].int() - images[2].int()).abs().float().mean() < 6


@BACKENDS
def test_a_sample_that_does_not_decode_is_named(make_shards, make_sample, backend):
    good = make_sample(1)
    bad = type(good)(good.jpeg[: len(good.jpeg) // 2], good.height, good.width)
    catalog = make_shards([[good, good, bad]])
    with pytest.raises(UserError, match=r"sample 000000000002 in .* does not decode .*shard verify"):
        list(open_images(catalog, size=16, resize=16, batch=2, backend=backend))


def test_what_dali_refuses_and_pillow_takes_is_there_all_the_same(make_shards, make_sample):
    samples = [make_sample(i, height=40, width=50) for i in range(7)]
    # The index says another size: DALI is not given such an image, since it might end the process.
    samples[3] = type(samples[3])(samples[3].jpeg, 41, 50)
    catalog = make_shards([samples])
    by_both = [
        torch.cat([b.images for b in open_images(catalog, size=16, resize=20, batch=2, backend=backend)])
        for backend in ("dali", "torch")
    ]
    assert len(by_both[0]) == 7
    assert (by_both[0].int() - by_both[1].int()).abs().max() <= 1
    assert torch.equal(by_both[0][2:4], by_both[1][2:4])


def test_a_crop_larger_than_the_image_is_an_error(catalog):
    with pytest.raises(UserError, match="size=224, resize=200 must obey"):
        next(open_images(catalog, size=224, resize=200, batch=4))
    with pytest.raises(UserError, match="batch=0 must be at least 1"):
        next(open_images(catalog, size=16, resize=16, batch=0))


@BACKENDS
def test_leaving_early_stops_the_threads(catalog, backend):
    images = open_images(catalog, size=16, resize=16, batch=4, backend=backend)
    next(images)
    images.close()
    assert list(images) == []


def test_what_does_not_decode_is_a_value_error_in_one_line(make_sample):
    whole = np.frombuffer(make_sample(0, height=48, width=64).jpeg, dtype=np.uint8)
    with pytest.raises(ValueError, match=r"(?i)truncated"):
        decode_rgb(whole[: whole.size // 2])
    # Not the address that Pillow's own words hold: it differs from run to run.
    with pytest.raises(ValueError, match=r"identify it$"):
        decode_rgb(whole[100:])


def test_a_batch_of_dalis_holds_no_more_decoded_images_than_fit_the_bound(catalog, monkeypatch):
    largest = 3 * catalog.max_height * catalog.max_width
    monkeypatch.setattr(evaluation_views, "DECODED_BYTES", 5 * largest)
    for backend, sizes in (("dali", {5}), ("torch", {16})):
        batches = list(open_images(catalog, size=16, resize=20, batch=16, num_threads=1, backend=backend))
        assert {len(batch.images) for batch in batches[:-1]} == sizes
        assert torch.cat([batch.position for batch in batches]).tolist() == list(range(catalog.num_samples))
    monkeypatch.setattr(evaluation_views, "DECODED_BYTES", 1)
    assert len(next(open_images(catalog, size=16, resize=20, batch=16, num_threads=1)).images) == 1

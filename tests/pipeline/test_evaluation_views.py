import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from linerate.pipeline.evaluation_views import decode_rgb, open_images
from linerate.pipeline.reader import ShardReader
from linerate.shards.errors import UserError


def by_torchvision(jpeg: np.ndarray, *, size: int, resize: int) -> torch.Tensor:
    image = Image.open(io.BytesIO(jpeg.tobytes())).convert("RGB")
    image = v2.CenterCrop(size)(v2.Resize(resize, interpolation=v2.InterpolationMode.BILINEAR)(image))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_every_sample_comes_once_in_position_order_with_a_short_last_batch(catalog):
    batches = list(open_images(catalog, size=16, resize=20, batch=16, num_threads=2))
    assert [len(b.images) for b in batches] == [16, 16, 9]
    assert torch.cat([b.position for b in batches]).tolist() == list(range(41))
    assert torch.cat([b.sample_id for b in batches]).tolist() == list(range(41))
    assert torch.cat([b.label for b in batches]).tolist() == [i % 3 for i in range(41)]


@pytest.mark.parametrize(("size", "resize"), [(16, 20), (32, 32), (37, 100)])
def test_pixels_are_torchvisions(catalog, size, resize):
    jpegs = ShardReader(catalog).read(np.arange(41)).jpegs
    batch = next(open_images(catalog, size=size, resize=resize, batch=41, num_threads=2))
    for image, jpeg in zip(batch.images, jpegs, strict=True):
        assert torch.equal(image, by_torchvision(jpeg, size=size, resize=resize))


def test_images_are_uint8_channels_last(catalog):
    images = next(open_images(catalog, size=16, resize=16, batch=4)).images
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_chosen_positions_come_in_the_order_chosen(catalog):
    every = next(open_images(catalog, size=16, resize=16, batch=41))
    chosen = list(open_images(catalog, size=16, resize=16, batch=2, positions=np.array([30, 2, 17])))
    assert torch.cat([b.position for b in chosen]).tolist() == [30, 2, 17]
    assert torch.equal(torch.cat([b.images for b in chosen]), every.images[[30, 2, 17]])
    assert list(open_images(catalog, size=16, resize=16, batch=2, positions=np.empty(0, np.int64))) == []


def test_grayscale_and_cmyk_become_rgb(make_shards, make_sample):
    gray, cmyk, rgb = (make_sample(3, height=32, width=32, mode=mode) for mode in ("L", "CMYK", "RGB"))
    images = next(open_images(make_shards([[gray, cmyk, rgb]]), size=32, resize=32, batch=3)).images
    assert torch.equal(images[0, 0], images[0, 1])
    assert (images[1].int() - images[2].int()).abs().float().mean() < 6


def test_a_sample_that_does_not_decode_is_named(make_shards, make_sample):
    good = make_sample(1)
    bad = type(good)(good.jpeg[: len(good.jpeg) // 2], good.height, good.width)
    catalog = make_shards([[good, good, bad]])
    with pytest.raises(UserError, match=r"sample 000000000002 in .* does not decode .*shard verify"):
        list(open_images(catalog, size=16, resize=16, batch=2))


def test_a_crop_larger_than_the_image_is_an_error(catalog):
    with pytest.raises(UserError, match="size=224, resize=200, batch=4 must obey"):
        next(open_images(catalog, size=224, resize=200, batch=4))


def test_leaving_early_stops_the_threads(catalog):
    images = open_images(catalog, size=16, resize=16, batch=4)
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

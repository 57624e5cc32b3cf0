"""DALI and torchvision behind the one protocol: same views, whatever the batches, threads and restarts."""

import io
import pickle
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from linerate.pipeline.dali_damage import undecodable_rows
from linerate.pipeline.dali_views import DaliViews, views_of_draws
from linerate.pipeline.draws import draw_views
from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.parity import only
from linerate.pipeline.recipe import find_recipe
from linerate.pipeline.torch_views import TorchViews
from linerate.pipeline.undecodable import UndecodableImages

SIZE = 24


@dataclass(frozen=True)
class Fetch:
    """Steps of `batch` samples in order; sample_id is 100 + position, to tell the two apart."""

    jpegs: tuple[bytes, ...]
    batch: int

    def __call__(self, step: int) -> EncodedBatch:
        rows = np.arange(step * self.batch, (step + 1) * self.batch)
        sizes = [image_size(self.jpegs[row]) for row in rows]
        return EncodedBatch(
            jpegs=[np.frombuffer(self.jpegs[row], dtype=np.uint8) for row in rows],
            sample_id=100 + rows,
            position=rows,
            label=rows % 3,
            height=np.array([height for _, height in sizes]),
            width=np.array([width for width, _ in sizes]),
        )


def image_size(jpeg):
    return Image.open(io.BytesIO(jpeg)).size


@pytest.fixture(scope="module")
def jpegs(make_sample):
    return tuple(make_sample(i, height=40 + 3 * i, width=90 - 2 * i).jpeg for i in range(24))


def dali(batch=6, *, recipe="v2", num_threads=1, prefetch=2, **options):
    return DaliViews(
        recipe=find_recipe(recipe, size=SIZE),
        seed=5,
        batch=batch,
        device="cpu",
        num_threads=num_threads,
        prefetch=prefetch,
        **options,
    )


def torchvision(batch=6, *, recipe="v2", num_threads=1):
    return TorchViews(
        recipe=find_recipe(recipe, size=SIZE),
        seed=5,
        batch=batch,
        device="cpu",
        num_threads=num_threads,
        prefetch=2,
    )


def pixels(batches):
    batches = list(batches)
    return torch.cat([b.query for b in batches]), torch.cat([b.key for b in batches])


def equal(one, other):
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("make", [dali, torchvision])
def test_a_batch_says_what_it_holds(make, jpegs):
    views = make()
    batches = list(views.run(Fetch(jpegs, 6), range(1, 3), epoch=0))
    views.close()
    assert len(batches) == 2
    for step, batch in zip((1, 2), batches, strict=True):
        for view in (batch.query, batch.key):
            assert (view.shape, view.dtype) == ((6, 3, SIZE, SIZE), torch.uint8)
            assert view.is_contiguous(memory_format=torch.channels_last)
        rows = torch.arange(6 * step, 6 * step + 6)
        assert torch.equal(batch.position, rows)
        assert torch.equal(batch.sample_id, 100 + rows)
        assert torch.equal(batch.label, rows % 3)
        assert not torch.equal(batch.query, batch.key)


def test_dali_makes_the_same_views_whatever_the_batch_threads_and_prefetch(jpegs):
    reference = pixels(dali().run(Fetch(jpegs, 6), range(4), epoch=2))
    for batch, num_threads, prefetch in ((1, 1, 1), (4, 3, 2), (12, 2, 3), (24, 1, 1)):
        views = dali(batch, num_threads=num_threads, prefetch=prefetch)
        assert equal(pixels(views.run(Fetch(jpegs, batch), range(24 // batch), epoch=2)), reference)


def test_a_restart_in_mid_epoch_goes_on_with_the_same_views(jpegs):
    fetch = Fetch(jpegs, 6)
    whole = list(dali().run(fetch, range(4), epoch=1))
    rest = list(dali().run(fetch, range(2, 4), epoch=1))
    assert equal(pixels(rest), pixels(whole[2:]))


def test_one_object_serves_many_epochs_that_differ(jpegs):
    fetch, views = Fetch(jpegs, 6), dali()
    epochs = [pixels(views.run(fetch, range(4), epoch=epoch)) for epoch in (0, 1, 0)]
    assert equal(epochs[0], epochs[2])
    assert not equal(epochs[0], epochs[1])


def test_an_epoch_left_early_does_not_leak_into_the_next(jpegs):
    fetch, views = Fetch(jpegs, 6), dali()
    whole = pixels(dali().run(fetch, range(4), epoch=1))
    left = views.run(fetch, range(4), epoch=0)
    next(left)
    # Still open, with batches of epoch 0 on their way.
    assert equal(pixels(views.run(fetch, range(4), epoch=1)), whole)
    left.close()
    assert equal(pixels(views.run(fetch, range(4), epoch=1)), whole)


def test_views_stay_what_they_are_while_they_are_held(jpegs):
    held = []
    for batch in dali().run(Fetch(jpegs, 2), range(12), epoch=0):
        held.append((batch.query, batch.query.clone()))
    assert all(torch.equal(view, copy) for view, copy in held)


def test_no_steps_are_no_batches(jpegs):
    for views in (dali(), torchvision()):
        assert list(views.run(Fetch(jpegs, 6), range(4, 4), epoch=0)) == []


@pytest.mark.parametrize("recipe", ["v1", "v2", "v3"])
@pytest.mark.parametrize("form", ["kernels", "operators"])
def test_dali_and_torchvision_make_the_same_views(recipe, form, jpegs):
    fetch = Fetch(jpegs, 12)
    ours = pixels(dali(12, recipe=recipe, form=form).run(fetch, range(1), epoch=3))
    reference = pixels(torchvision(12, recipe=recipe).run(fetch, range(1), epoch=3))
    for one, other in zip(ours, reference, strict=True):
        assert (one.int() - other.int()).abs().float().mean() < 0.5


def test_torchvision_in_workers_makes_the_same_views_and_names_what_does_not_decode(jpegs):
    fetch = Fetch(jpegs, 6)
    alone = list(torchvision().run(fetch, range(3), epoch=0))
    workers = list(torchvision(num_threads=2).run(fetch, range(3), epoch=0))
    assert equal(pixels(workers), pixels(alone))
    assert [b.sample_id.tolist() for b in workers] == [b.sample_id.tolist() for b in alone]
    with pytest.raises(UndecodableImages, match="000000000107") as error:
        list(torchvision(num_threads=2).run(Fetch(cut(jpegs, 7), 6), range(2), epoch=0))
    assert error.value.sample_id == [107]


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_gray_and_cmyk_jpegs_become_rgb(mode, make_sample):
    sample = make_sample(1, height=50, width=70, mode=mode)
    fetch = Fetch((sample.jpeg,), 1)
    ours = pixels(dali(1, recipe="v1").run(fetch, range(1), epoch=0))
    reference = pixels(torchvision(1, recipe="v1").run(fetch, range(1), epoch=0))
    for one, other in zip(ours, reference, strict=True):
        assert (one.int() - other.int()).abs().max() <= 4


def test_the_exif_orientation_turns_nothing(make_sample):
    image = Image.open(io.BytesIO(make_sample(3, height=40, width=60).jpeg))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, plain = io.BytesIO(), io.BytesIO()
    image.save(turned, "JPEG", quality=95, exif=exif)
    image.save(plain, "JPEG", quality=95)
    for make in (dali, torchvision):
        ours, reference = (
            pixels(make(1).run(Fetch((file.getvalue(),), 1), range(1), epoch=0)) for file in (turned, plain)
        )
        assert equal(ours, reference)


def cut(jpegs, *rows):
    return tuple(one[: len(one) // 2] if row in rows else one for row, one in enumerate(jpegs))


@pytest.mark.parametrize("make", [dali, torchvision])
def test_images_that_do_not_decode_are_named_and_the_object_lives_on(make, jpegs):
    views, bad = make(), Fetch(cut(jpegs, 13, 16), 6)
    seen = []
    with pytest.raises(UndecodableImages, match="000000000113, 000000000116") as error:
        seen.extend(views.run(bad, range(4), epoch=0))
    assert error.value.sample_id == [113, 116]
    assert error.value.position == [13, 16]
    assert "\n" not in str(error.value)
    assert len(seen) == 2
    good = Fetch(jpegs, 6)
    assert equal(pixels(views.run(good, range(4), epoch=0)), pixels(make().run(good, range(4), epoch=0)))


def test_the_error_survives_pickling_and_shortens_long_lists():
    error = UndecodableImages(range(20), range(20), "a\n  reason")
    again = pickle.loads(pickle.dumps(error))
    assert (again.sample_id, again.position, str(again)) == (list(range(20)), list(range(20)), str(error))
    assert "000000000007 and 12 more: a reason" in str(error)


def test_undecodable_rows_are_found_among_good_ones(jpegs):
    arrays = [np.frombuffer(one, dtype=np.uint8) for one in cut(jpegs, 0, 5, 6, 23)]
    assert undecodable_rows(arrays) == [0, 5, 6, 23]


MANY_BROKEN = """
import io, sys
import numpy as np
from PIL import Image
from linerate.pipeline.dali_views import DaliViews
from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.recipe import find_recipe
out = io.BytesIO()
Image.fromarray(np.arange(48 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(48, 64, 3)).save(out, "JPEG")
good = np.frombuffer(out.getvalue(), np.uint8)
zeroed, cut, other = good.copy(), good[: good.size // 2], good.copy()
zeroed[2:200] = 0
frame = out.getvalue().index(bytes([255, 192]))
other[frame + 5] = 9
broken = {50: zeroed, 52: zeroed, 60: good[:0], 61: good[:3], 70: other, 90: zeroed, 100: zeroed, 115: zeroed}
def fetch(step):
    rows = np.arange(40 * step, 40 * step + 40)
    one = np.ones(40, np.int64)
    return EncodedBatch(
        jpegs=[broken.get(int(row), good) for row in rows],
        sample_id=rows, position=rows, label=rows, height=48 * one, width=64 * one,
    )
views = DaliViews(
    recipe=find_recipe("v2", size=24), seed=0, batch=40, device="cpu", num_threads=2, prefetch=2
)
seen = 0
try:
    for batch in views.run(fetch, range(3), epoch=0):
        seen += 1
except Exception as error:
    print(seen, type(error).__name__, error.sample_id)
print(len(list(views.run(lambda step: fetch(0), range(2), epoch=1))))
"""


def test_many_broken_headers_in_one_batch_do_not_end_the_process():
    """DALI itself ends by SIGSEGV on such a batch; a test in this process would take the others with it."""
    done = subprocess.run([sys.executable, "-c", MANY_BROKEN], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1 UndecodableImages [50, 52, 60, 61, 70]", "2"]


def test_an_error_of_the_reader_comes_through(jpegs):
    def fetch(step):
        if step == 2:
            raise OSError("shard gone")
        return Fetch(jpegs, 6)(step)

    views = dali()
    with pytest.raises(OSError, match="shard gone"):
        list(views.run(fetch, range(4), epoch=0))
    assert len(list(views.run(Fetch(jpegs, 6), range(4), epoch=0))) == 4


@pytest.mark.parametrize("form", ["kernels", "operators"])
def test_a_header_that_promises_a_larger_image_does_no_harm(form, make_sample):
    """The index said 200x200 and the file, damaged since, is 40x60."""
    jpeg = np.frombuffer(make_sample(0, height=40, width=60).jpeg, dtype=np.uint8)
    rows = np.arange(8)
    draws = draw_views(
        find_recipe("v2", size=SIZE),
        seed=0,
        epoch=0,
        sample_id=rows,
        height=np.full(8, 200),
        width=np.full(8, 200),
        view=0,
    )
    plain = only(draws, None)
    views, _ = views_of_draws([jpeg] * 8, (plain, plain), size=SIZE, form=form)
    assert views.shape == (8, SIZE, SIZE, 3)

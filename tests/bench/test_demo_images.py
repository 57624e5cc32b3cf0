import numpy as np
import pytest
from PIL import Image

from linerate.bench.demo_images import CLASSES, OUTLINES, TEXTURES, draw_image, write_images


def test_an_image_follows_from_its_seed_alone():
    first, again, other = (draw_image("disc-stripes", rng=np.random.default_rng(s)) for s in (1, 1, 2))
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    assert (first == again).all()
    assert (first != other).mean() > 0.5


def test_every_class_is_an_outline_and_a_texture_of_its_own():
    pairs = list(CLASSES.values())
    assert len(set(pairs)) == len(pairs) == 10
    assert {outline for outline, _ in pairs} <= OUTLINES.keys()
    assert {texture for _, texture in pairs} <= TEXTURES.keys()


@pytest.mark.parametrize("outline", sorted(OUTLINES))
def test_an_outline_holds_some_of_its_circle_and_nothing_far_outside(outline):
    v, u = np.mgrid[-2:2:200j, -2:2:200j].astype(np.float32)
    inside = OUTLINES[outline](u, v) > 0
    # The hourglass has the farthest corners, the ring and the bar cover least.
    assert not inside[np.hypot(u, v) > 1.35].any()
    assert inside[np.hypot(u, v) < 1.2].mean() > 0.2


def test_colours_do_not_tell_the_class():
    """The mean colour of an image predicts its class no better than chance would by some margin."""
    rng = np.random.default_rng(0)
    names = list(CLASSES)
    means = np.array([[draw_image(n, rng=rng, size=16).mean((0, 1)) for n in names] for _ in range(60)])
    train, test = means[:40], means[40:]
    centres = train.mean(0)
    nearest = np.linalg.norm(test[:, :, None] - centres, axis=-1).argmin(-1)
    assert (nearest == np.arange(len(names))).mean() < 0.25


def test_writing_gives_the_same_bytes_however_many_there_are(tmp_path):
    write_images(tmp_path / "few", num_images=20, seed=3)
    write_images(tmp_path / "many", num_images=130, seed=3)
    few = sorted(p.relative_to(tmp_path / "few") for p in (tmp_path / "few").rglob("*.jpg"))
    assert len(few) == 20
    assert len({p.parent for p in few}) == 10
    assert all((tmp_path / "few" / p).read_bytes() == (tmp_path / "many" / p).read_bytes() for p in few)
    with Image.open(tmp_path / "few" / few[0]) as image:
        assert image.size == (64, 64)

import base64
import dataclasses
import io
import re

import numpy as np
from PIL import Image
from tests.pipeline.test_preview import seen

from linerate.pipeline.gallery import write_animation, write_gallery
from linerate.pipeline.preview import draw_sheet

EPOCHS = [dataclasses.replace(seen(query=50 + 40 * epoch, key=90), epoch=epoch) for epoch in range(3)]


def test_the_animation_has_one_frame_an_epoch(tmp_path):
    path = tmp_path / "views.gif"
    write_animation(path, EPOCHS, title="t", class_names=("a", "b"))
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.info["loop"]) == (3, 0)
        for epoch in range(3):
            gif.seek(epoch)
            frame = np.asarray(gif.convert("RGB")).astype(int)
            level = (abs(frame - (50 + 40 * epoch)).max(axis=2) <= 2).sum()
            assert level >= 222 * 222
    sheet = draw_sheet(EPOCHS[:1], title="t", class_names=("a", "b"))
    assert gif.size == sheet.size


def test_the_page_holds_the_image_once_and_both_views_of_every_epoch(tmp_path):
    path = tmp_path / "views.html"
    write_gallery(path, EPOCHS, title="t", class_names=("a", "b"))
    pictures = re.findall("data:image/jpeg;base64,([^']+)", path.read_text())
    levels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(p)))).mean() for p in pictures]
    assert np.allclose(levels[1:], [50, 90, 90, 90, 130, 90], atol=2)
    assert "src='http" not in path.read_text()


def test_a_class_named_like_markup_stays_text(tmp_path):
    path = tmp_path / "views.html"
    write_gallery(path, EPOCHS, title="<script>", class_names=("a", "<img onerror=x>"))
    page = path.read_text()
    assert "<script>" not in page
    assert "<img onerror" not in page
    assert "&lt;img onerror=x&gt;" in page

import numpy as np
import pytest
from PIL import Image

from linerate.pipeline.draws import Draw
from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.preview import SeenSample, _stored_image, caption, draw_sheet, find_position
from linerate.pipeline.undecodable import UndecodableImages
from linerate.shards.errors import UserError


def draws(**values: float) -> np.ndarray:
    row = np.zeros(len(Draw), dtype=np.float32)
    for name, value in values.items():
        row[Draw[name.upper()]] = value
    return row


def seen(*, query: int, key: int, size: int = 32) -> SeenSample:
    return SeenSample(
        image=Image.new("RGB", (400, 200), (0, 200, 0)),
        query=np.full((size, size, 3), query, dtype=np.uint8),
        key=np.full((size, size, 3), key, dtype=np.uint8),
        query_draws=draws(top=20, left=40, bottom=120, right=240),
        key_draws=draws(top=0, left=0, bottom=200, right=400),
        sample_id=7,
        position=5,
        label=1,
        epoch=2,
    )


def test_ids_with_gaps_are_found_in_every_shard(make_shards, make_sample):
    one = make_sample(0, height=8, width=8)
    ids = [0, 2, 3, 7, 8, 20, 21]
    catalog = make_shards([[one] * 3, [one], [one] * 3], sample_ids=ids)
    assert [find_position(catalog, sample_id) for sample_id in ids] == list(range(7))
    for rejected in (1, 4, 9, 19):
        with pytest.raises(UserError, match=f"sample {rejected} was rejected when packing"):
            find_position(catalog, rejected)
    for unknown in (-1, 22):
        with pytest.raises(UserError, match=rf"sample {unknown} is not in 0\.\.21; `linerate shard inspect"):
            find_position(catalog, unknown)


def test_the_sheet_shows_source_query_and_key_side_by_side():
    sheet = np.asarray(draw_sheet([seen(query=50, key=90)] * 3, title="t", class_names=("a", "b")))
    assert (sheet == (0, 200, 0)).all(axis=2).sum() > 3 * 224 * 90
    left, right = ((sheet == level).all(axis=2) for level in (50, 90))
    assert left.sum() >= 3 * 222 * 222
    assert right.sum() >= 3 * 222 * 222
    assert left.sum(axis=0).argmax() < right.sum(axis=0).argmax()


def test_the_sheet_marks_the_crop_windows_where_they_were():
    sheet = np.asarray(draw_sheet([seen(query=50, key=90)], title="t", class_names=("a", "b")))
    blue = (sheet == (31, 95, 191)).all(axis=2)[:, :234]
    rows, columns = np.flatnonzero(blue[48:272].any(axis=1)), np.flatnonzero(blue[48:272].any(axis=0))
    # 400x200 shrinks to 224x112 and sits 56 pixels below the tile's top.
    assert abs(rows[0] - (56 + 20 * 0.56)) <= 1
    assert abs(rows[-1] - (56 + 120 * 0.56)) <= 2
    assert abs(columns[0] - (10 + 40 * 0.56)) <= 1
    assert abs(columns[-1] - (10 + 240 * 0.56)) <= 2


def test_the_caption_says_what_was_drawn():
    plain = caption(draws(bottom=50, right=40), height=100, width=100)
    assert plain == ["crop 20%", "no jitter"]
    row = draws(bottom=100, right=100, jitter=1, brightness=0.8, contrast=1.2, saturation=1, hue=-0.05)
    row[[Draw.JITTER_ORDER, Draw.FLIP, Draw.GRAY, Draw.SOLARIZE, Draw.BLUR_SIGMA]] = 23, 1, 1, 1, 1.5
    expected = ["crop 100%  flip  gray  blur 1.50  solarize", "jitter h-0.05 s1.00 c1.20 b0.80"]
    assert caption(row, height=100, width=100) == expected


def test_an_image_that_cannot_be_shown_is_named(make_sample):
    jpeg = np.frombuffer(make_sample(0).jpeg, dtype=np.uint8)
    one = np.array([7])
    broken = EncodedBatch(jpegs=[jpeg[100:]], sample_id=one, position=one, label=one, height=one, width=one)
    with pytest.raises(UndecodableImages, match="cannot decode sample 000000000007"):
        _stored_image(broken, 0)

"""Which images a policy rejects, leaves alone, strips or writes anew."""

import io
from collections.abc import Callable

import pytest
from PIL import Image

from linerate.shards.errors import UserError
from linerate.shards.image_policy import make_judge
from linerate.shards.inspect_image import (
    CONVERTED,
    EXIF,
    ORIENTED,
    PROGRESSIVE,
    RESIZED,
    STRIPPED,
    TRANSCODED,
    TURNED,
    RejectedError,
)
from linerate.shards.options import ImagePolicy, PackOptions

MakeJpeg = Callable[..., bytes]


def exif(turn: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = turn
    block[0x010F] = "maker"
    return block


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (30, 20)).save(out, "PNG")
    return out.getvalue()


def test_without_a_wish_every_byte_stays(make_jpeg: MakeJpeg) -> None:
    jpeg = make_jpeg(0, 20, 30, exif=exif(6), progressive=True) + b"more"
    for check in ("header", "decode"):
        taken = make_judge(ImagePolicy(check=check))(memoryview(jpeg))
        assert taken.jpeg is None
        assert taken.header[:2] == (20, 30)
    with pytest.raises(RejectedError, match="not a JPEG: PNG"):
        make_judge(ImagePolicy())(png())


@pytest.mark.parametrize("policy", [{}, {"baseline": True}, {"resize": 20}, {"strip_exif": True}])
def test_limits_on_dimensions_hold_under_every_policy(make_jpeg: MakeJpeg, policy: dict[str, object]) -> None:
    with pytest.raises(RejectedError, match="too small: 30 x 20, less than --min-side 21"):
        make_judge(ImagePolicy(min_side=21, **policy))(make_jpeg(0, 20, 30))
    with pytest.raises(RejectedError, match="too many pixels: 30 x 20 exceeds --max-pixels 599"):
        make_judge(ImagePolicy(max_pixels=599, **policy))(make_jpeg(0, 20, 30))
    make_judge(ImagePolicy(min_side=20, max_pixels=600, **policy))(make_jpeg(0, 20, 30))


def test_resize_leaves_small_images_alone(make_jpeg: MakeJpeg) -> None:
    judge = make_judge(ImagePolicy(resize=20))
    for small in (make_jpeg(0, 20, 30), make_jpeg(0, 10, 300, progressive=True, exif=exif(6))):
        assert judge(small).jpeg is None
    taken = judge(make_jpeg(0, 40, 60, progressive=True))
    assert taken.header == (20, 30, RESIZED | TRANSCODED)


def test_baseline_touches_only_what_hardware_refuses(make_jpeg: MakeJpeg) -> None:
    judge = make_judge(ImagePolicy(baseline=True))
    assert judge(make_jpeg(0)).jpeg is None
    assert judge(make_jpeg(0, mode="L", exif=exif(1))).jpeg is None
    assert judge(make_jpeg(0, 20, 30, exif=exif(6))).header == (30, 20, TURNED)
    assert judge(make_jpeg(0, 20, 30, progressive=True)).header.flags == TRANSCODED
    assert judge(png()).header.flags == CONVERTED


def test_strip_takes_metadata_out_and_nothing_else(make_jpeg: MakeJpeg) -> None:
    judge = make_judge(ImagePolicy(strip_exif=True, check="decode"))
    bare = make_jpeg(0)
    assert judge(bare).jpeg is None
    stripped = judge(bare[:20] + make_jpeg(0, exif=exif(1))[20:])
    assert (stripped.jpeg, stripped.header.flags) == (bare, STRIPPED)
    turned = judge(make_jpeg(0, exif=exif(6), progressive=True))
    assert turned.header.flags == STRIPPED | EXIF | ORIENTED | PROGRESSIVE
    assert turned.jpeg is not None
    assert b"maker" not in turned.jpeg
    again = judge(turned.jpeg)
    assert again.jpeg is None


def test_damage_is_found_in_what_is_stripped_too(make_jpeg: MakeJpeg) -> None:
    damaged = make_jpeg(0, 90, 90, exif=exif(1))[:-60] + b"\xff\xd9"
    assert make_judge(ImagePolicy(strip_exif=True))(damaged).jpeg
    with pytest.raises(RejectedError, match="does not decode"):
        make_judge(ImagePolicy(strip_exif=True, check="decode"))(damaged)


def test_dali_judges_what_is_stored(make_jpeg: MakeJpeg, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []

    class Judge:
        def check(self, jpeg: bytes) -> None:
            seen.append(bytes(jpeg))

    monkeypatch.setattr("linerate.shards.dali_check.process_judge", Judge)
    judge = make_judge(ImagePolicy(check="dali", resize=20))
    small, large = make_jpeg(0, 20, 30), make_jpeg(0, 40, 60)
    assert (judge(small).jpeg, judge(large).jpeg) == (None, seen[1])
    assert seen[0] == small


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": 4}, "--resize is 4, at least 8"),
        ({"quality": 0}, "--quality is 0; JPEG knows 1 to 100"),
        ({"quality": 101}, "--quality is 101"),
        ({"min_side": 0}, "--min-side is 0, at least 1"),
        ({"max_pixels": 0}, "--max-pixels is 0, at least 1"),
    ],
)
def test_impossible_wishes_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PackOptions(**options)


def test_the_policy_is_the_options_without_the_rest() -> None:
    options = PackOptions(name="x", resize=256, strip_exif=True)
    assert options.policy == ImagePolicy(resize=256, strip_exif=True)
    assert type(options.policy) is ImagePolicy
    assert (options.may_crash, PackOptions().may_crash, PackOptions(baseline=True).may_crash) == (
        True,
        False,
        True,
    )


def test_shards_of_shrunk_images_are_expected_to_be_small() -> None:
    assert ImagePolicy().expected_bytes(samples=10, total_bytes=10**6) == 10**6
    assert ImagePolicy(resize=256).expected_bytes(samples=10, total_bytes=10**6) == 275_251
    assert ImagePolicy(resize=256).expected_bytes(samples=10, total_bytes=1000) == 1000

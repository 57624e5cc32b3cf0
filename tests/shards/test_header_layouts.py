"""Headers read by a known layout: what a walk over the segments finds, or nothing."""

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from linerate.shards.header_layouts import HeaderLayouts
from linerate.shards.inspect_image import RejectedError, _walk_markers

MakeJpeg = Callable[..., bytes]
SEGMENTS = {"app0": b"\xff\xe0\0\5abc", "table": b"\xff\xdb\0\4xy", "comment": b"\xff\xfe\0\2"}


def jpeg(*names: str, frame: int = 0xC0, channels: int = 3, height: int = 20, width: int = 30) -> bytes:
    size = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    sof = bytes([0xFF, frame, 0, 8 + 3 * channels, 8]) + size + bytes([channels]) + bytes(3 * channels)
    before = b"".join(SEGMENTS[name] for name in names)
    return (
        b"\xff\xd8"
        + before
        + sof
        + SEGMENTS["table"]
        + b"\xff\xda\0\x0cscan-header"
        + b"\1" * 20
        + b"\xff\xd9"
    )


def learned(*images: bytes) -> HeaderLayouts:
    layouts = HeaderLayouts()
    for image in images:
        layouts.learn(image, _walk_markers(image))
    return layouts


def test_a_layout_is_known_when_two_in_sequence_had_it() -> None:
    image, other = jpeg("app0", height=21), jpeg("app0", "comment")
    assert learned(image, other, image).read(image) is None
    layouts = learned(image, image)
    assert layouts.read(image) == (21, 30, 0, _walk_markers(image)[3])
    assert layouts.read(jpeg("app0", height=700, width=5)) == (700, 5, 0, _walk_markers(image)[3])
    assert layouts.read(other) is None


def test_images_of_several_layouts_keep_theirs_and_the_oldest_goes() -> None:
    images = [jpeg(*["comment"] * count) for count in range(4)]
    layouts = HeaderLayouts(most=3)
    for image in images:
        for _ in range(2):
            layouts.learn(image, _walk_markers(image))
    assert [layouts.read(image) is not None for image in images] == [False, True, True, True]


def test_what_flags_depend_on_is_part_of_the_layout() -> None:
    layouts = learned(*[jpeg("app0")] * 2)
    for other in (jpeg("app0", frame=0xC2), jpeg("app0", channels=1)):
        assert layouts.read(other) is None
        assert _walk_markers(other)[2] != 0


def test_a_segment_whose_content_matters_is_never_learned() -> None:
    exif = b"\xff\xd8\xff\xe1\0\x0aExif\0\0MM" + jpeg("app0")[2:]
    stray = b"\xff\xd8\0" + jpeg("app0")[2:]
    for image in (exif, stray):
        assert learned(image, image).read(image) is None


@settings(max_examples=200, deadline=None)
@given(
    place=st.integers(0, 80),
    value=st.integers(0, 255),
    cut=st.none() | st.integers(0, 90),
    frame=st.sampled_from([0xC0, 0xC1, 0xC2]),
)
def test_a_changed_byte_is_read_as_a_walk_reads_it(
    place: int, value: int, cut: int | None, frame: int
) -> None:
    image = jpeg("app0", "table", "comment", frame=frame)
    layouts = learned(image, image)
    changed = bytearray(image)
    changed[min(place, len(image) - 1)] = value
    data = bytes(changed)[:cut]
    found = layouts.read(data)
    try:
        walked = _walk_markers(data)
    except (RejectedError, IndexError):
        walked = None
    assert found is None or found == walked


def test_images_of_an_encoder_are_read_by_their_layout(make_jpeg: MakeJpeg) -> None:
    layouts = learned(*[make_jpeg(seed, 20, 30) for seed in (0, 1)])
    image = make_jpeg(2, 50, 40)
    assert layouts.read(memoryview(image)) == _walk_markers(image)

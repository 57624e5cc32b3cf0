import pytest

from linerate.shards.errors import show_bytes


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1_000, "1 kB"),
        (74_400, "74.4 kB"),
        (999_999, "1,000 kB"),
        (12_345_678, "12.3 MB"),
        (110_000_000_000, "110 GB"),
        (5.4e15, "5,400 TB"),
    ],
)
def test_bytes_are_shown_in_the_unit_that_fits(size: float, shown: str) -> None:
    assert show_bytes(size) == shown

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from linerate.shards import terminal
from linerate.shards.errors import UserError
from linerate.shards.terminal import parse_args


@dataclass(frozen=True, kw_only=True)
class Inner:
    share: float = 0.5
    """A share."""

    def __post_init__(self) -> None:
        if self.share > 1:
            raise UserError(f"share={self.share} is above 1; give one in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags of every kind."""

    source: tyro.conf.Positional[Path]
    """What is read."""
    out: Annotated[Path, tyro.conf.arg(aliases=["--out-dir"])]
    """Where it goes: a long help text, so that the box around the message has to break it over lines."""
    kind: Literal["step", "cosine"] = "step"
    """A word of two."""
    count: int = 3
    """A number of things."""
    limit: int | None = None
    """At most so many."""
    ids: tuple[int, ...] = ()
    """Some numbers."""
    json: bool = False
    """A switch."""
    inner: Inner = Inner()


def _told(*words: str) -> str:
    with pytest.raises(UserError) as error:
        parse_args(Flags, list(words), prog="linerate x")
    text, _, hint = str(error.value).rpartition(" (see ")
    assert hint == "`linerate x --help`)"
    return text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--kind foo", "--kind foo is not one of step, cosine"),
        ("--kind cosin", "--kind cosin is not one of step, cosine; did you mean cosine?"),
        ("--count abc", "--count abc does not fit: it takes a whole number"),
        ("--limit 1.5", "--limit 1.5 does not fit: it takes a whole number or None"),
        ("--share x", "--share x does not fit: it takes a number"),
        ("--ids 1 b", "--ids 1 b does not fit: each must be a whole number"),
        ("--share 3", "share=3.0 is above 1; give one in [0, 1]"),
        ("--count", "--count needs a value"),
        ("--coumt 3", "there is no --coumt; did you mean --count or --out?"),
        ("--out-dri x --bogus", "there is no --out-dri and no --bogus; did you mean --out-dir?"),
        ("extra", "extra: nothing takes this word"),
        ("--json=3 extra", "3, extra: nothing takes these words"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_each_mistake_is_one_line_with_the_value_and_the_rule(
    words: str, line: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert _told("a", "--out", "b", *words.split()) == line


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_is_missing_is_named_with_what_it_is_for(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    out = (
        "--out-dir PATH, --out PATH (Where it goes: a long help text, so that the box around the message has "
        "to break it over lines)"
    )
    assert _told("a") == f"missing: {out}"
    assert _told() == f"missing: PATH (What is read), {out}"
    assert _told("a", "--bogus", "7") == f"missing: {out}; there is no --bogus"
    assert _told("--bogus") == "SOURCE is missing"


@pytest.mark.parametrize(
    "box", ["", "odd words\nof a\nlater tyro", "\u256d\u2500 Value error \u2500\u256e\n\u2502 odd \u2502"]
)
def test_a_message_of_another_form_is_folded_into_a_line(box: str) -> None:
    line = terminal._one_line(box)
    assert line
    assert "\n" not in line
    assert all(word in line for word in box.split() if word.isalpha())

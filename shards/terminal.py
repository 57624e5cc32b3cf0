"""What every command shares at the terminal: arguments, progress on stderr, results on stdout."""

import contextlib
import difflib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from linerate.shards.errors import UserError

ConfigT = TypeVar("ConfigT")
Command = Callable[[list[str]], int]

# Progress, tables meant for people and warnings go to stderr; stdout carries the result alone.
stderr = Console(stderr=True)


def parse_args(
    config: type[ConfigT], argv: list[str], *, prog: str, default: ConfigT | None = None
) -> ConfigT:
    """The dataclass `config` filled from argv by tyro, over `default`; --help prints and exits with 0.

    Raises UserError with tyro's own message, or that of a __post_init__, folded into one line.
    """
    # Not above: what draws tables needs this file, too, also where no command line is read.
    import tyro

    printed = io.StringIO()
    markers = (tyro.conf.OmitArgPrefixes,)
    try:
        with contextlib.redirect_stderr(printed):
            return cast(ConfigT, tyro.cli(config, args=argv, prog=prog, default=default, config=markers))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(f"{_one_line(printed.getvalue())} (see `{prog} --help`)") from None


def _one_line(text: str) -> str:
    """What tyro says in a box of several lines, as one: the values, the rule, the flag that was meant."""
    title, sections = _read_box(text)
    told = _TOLD[title](sections) if title in _TOLD and sections else None
    return told or _fold([title, *map(_fold, sections)]) or "the arguments do not fit"


def _read_box(text: str) -> tuple[str, list[list[str]]]:
    """A box's title and its lines, indented, in sections as rules cut them; the one on --help is left out.

    Where stdout does not say `utf-8` the box has no frame, and its rules are of `-`.
    """
    first, *rest = text.splitlines() or [""]
    sections = list[list[str]]([[]])
    for line in rest:
        bare = line.strip(_FRAME)
        if bare and not bare.strip("\u2500-"):
            sections.append([])
        elif bare:
            sections[-1].append(re.sub("^[\u2502 ] ", "", line).rstrip(_FRAME))
    sections = [lines for lines in sections if lines and not lines[0].startswith("For full helptext")]
    return first.strip(_FRAME + "\u2500"), sections


def _fold(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


def _told_choice(sections: list[list[str]]) -> str | None:
    found = re.search(r"choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)", _fold(sections[0]))
    if not found:
        return None
    value, flag, choices = found[1], found[2], re.findall(r"'([^']*)'", found[3])
    return f"{flag} {value} is not one of {', '.join(choices)}{_meant(value, choices)}"


def _told_value(sections: list[list[str]]) -> str | None:
    found = re.match(r"Error parsing ([^:]*): (.*)", _fold(sections[0]))
    if not found:
        return None
    name, message = found[1], found[2].partition(" Got errors:")[0]
    if len(sections) == 1:  # of a __post_init__: its text is ours
        return message
    given = re.search(r"\[(.*)\]\.?$|('.*')$", message)
    usage = sections[1][1] if len(sections[1]) > 1 else ""  # `Argument helptext:`, `    --epochs {None}|INT`
    kinds = re.findall(r"INT|FLOAT|PATH|STR|None", usage)
    if not given or not kinds:
        return f"{name}: {message}"
    values = " ".join(re.findall(r"'([^']*)'", given[0]))
    takes = " or ".join(_KINDS.get(kind, kind) for kind in sorted(dict.fromkeys(kinds)))
    rule = "each must be" if "..." in usage else "it takes"
    return f"{name} {values} does not fit: {rule} {takes}"


def _told_unknown(sections: list[list[str]]) -> str | None:
    words = _fold(sections[0]).removeprefix("Unrecognized options: ").split(", ")
    flags = [word for word in words if word.startswith("-")]
    if not flags:
        # As the `3` of `--json=3`, too.
        return f"{', '.join(words)}: nothing takes {'this word' if len(words) == 1 else 'these words'}"
    # What is near stands there as `    --run-dir, --run PATH`, its help deeper.
    lines = [line for lines in sections[1:] for line in lines if line.startswith("    --")]
    names = [re.findall(r"(--[\w-]+)(?:,|$| )", line) for line in lines]
    near = [difflib.get_close_matches(flags[0], found, n=1, cutoff=0.0)[0] for found in names if found]
    meant = f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
    return f"there is no {' and no '.join(flags)}{meant}"


def _told_no_value(sections: list[list[str]]) -> str | None:
    found = re.search(r"argument '(.*)'\. Expected (.*) values?", _fold(sections[0]))
    if not found:
        return None
    if not found[1].startswith("-"):
        return f"{found[1].upper()} is missing"
    return f"{found[1]} needs {'a value' if found[2] == '1' else f'{found[2]} values'}"


def _told_missing(sections: list[list[str]]) -> str | None:
    """Each missing argument is a line `    --shards PATH`, its help below it deeper."""
    named: list[list[str]] = []
    for line in sections[0][1:]:
        if line.startswith(" " * 8) and named:
            named[-1].append(line)
        else:
            named.append([line])
    told = [(_fold(lines[:1]), _fold(lines[1:]).removesuffix("(required)").rstrip(". ")) for lines in named]
    if not told:
        return None
    missing = "missing: " + ", ".join(f"{name} ({about})" if about else name for name, about in told)
    unknown = [word for lines in sections[1:] for word in map(str.strip, lines) if word.startswith("--")]
    return f"{missing}; there is no {' and no '.join(unknown)}" if unknown else missing


def _meant(value: str, names: list[str]) -> str:
    near = difflib.get_close_matches(value, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


_FRAME = "\u2502\u256d\u256e\u2570\u256f "
_KINDS = {"INT": "a whole number", "FLOAT": "a number", "PATH": "a path", "STR": "a word"}
# The titles of tyro's boxes; one that is not here is folded into a line as it is.
_TOLD: dict[str, Callable[[list[list[str]]], str | None]] = {
    "Invalid choice": _told_choice,
    "Value error": _told_value,
    "Unrecognized options": _told_unknown,
    "Missing argument": _told_no_value,
    "Required options": _told_missing,
}


def dispatch(commands: Mapping[str, tuple[Command, str]], argv: list[str], *, prog: str) -> int:
    """Run the subcommand that argv names. commands: name -> (function of the rest of argv, one line of help).

    Raises UserError for a name that is not there, with the nearest that is.
    """
    if not argv or argv[0] in ("-h", "--help"):
        console = Console()
        console.print(f"usage: {prog} COMMAND [ARGS]    `{prog} COMMAND --help` for one command\n")
        for name, (_, line) in commands.items():
            console.print(f"  [bold cyan]{name:<12}[/] {line}", highlight=False)
        return 0
    if argv[0] not in commands:
        near = difflib.get_close_matches(argv[0], commands, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(commands)}"
        raise UserError(f"`{prog}` has no command `{argv[0]}`; {hint}")
    return commands[argv[0]][0](argv[1:])


def nearest(name: str, names: list[str], *, what: str) -> UserError:
    """The error for a name that does not exist: the nearest that does, and all of them."""
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean `{near[0]}`? " if near else ""
    return UserError(f"there is no {what} `{name}`; {hint}there are {', '.join(sorted(names))}")


def visible(text: str) -> str:
    """A name from somewhere else, safe to print: what moves the cursor or turns the text is spelled out.

    Such as `\\x1b` and `\\u202e`; letters of all scripts stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def make_parent(out: Path) -> None:
    """Make the folder of a file that a command is about to write. Raises UserError where it cannot be."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: its folder {out.parent} cannot be made ({error.strerror or error}); "
            f"name another"
        ) from None


def require_counts(flags: object, *names: str) -> None:
    """Raise UserError for the first of these flags that is below 1; None leaves the value to the command."""
    for name in names:
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")


@contextlib.contextmanager
def progress(description: str, *, total: float | None, unit: str) -> Iterator[Callable[[float], None]]:
    """A bar on stderr with rate and remaining time; yields advance(amount). Silent off a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn() if total is not None else TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(description, total=total, rate="")

        def advance(amount: float) -> None:
            bar.advance(task, amount)
            speed = bar.tasks[0].speed
            bar.update(task, rate=f"{speed:,.0f} {unit}/s" if speed else "")

        yield advance


def emit_json(result: Mapping[str, Any]) -> None:
    """One JSON object on one line of stdout; NaN and infinity become null, as JSON has neither."""
    sys.stdout.write(json.dumps(_finite(result), default=str) + "\n")
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value

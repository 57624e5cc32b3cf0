"""What every command shares at the terminal: arguments, progress on stderr, results on stdout."""

import contextlib
import difflib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import tyro
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
    """What tyro says in a box of several lines: the value and the rule, or the flag that was meant."""
    text = " ".join(re.sub(r"[\u2500-\u257f]+", " ", text).split())
    for tail in (" For full helptext", " Argument helptext", " Got errors"):
        text = text.partition(tail)[0]
    text, _, near = text.partition(" Perhaps you meant: ")
    text = re.sub(r"^(Parsing error|Value error|Unrecognized options|Missing argument) ", "", text)
    text = re.sub(r"^Error parsing (?=--)|^Error parsing [^:]*: ", "", text)
    flags = list(dict.fromkeys(re.findall(r"(?:^|\) )(--[\w-]+)", near)))
    return (text or "the arguments do not fit") + (f"; did you mean {' or '.join(flags)}?" if flags else "")


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

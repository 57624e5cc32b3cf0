"""The folder that shards are written to: whose it is, who may write, what a killed run left there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from itertools import filterfalse
from pathlib import Path

from linerate.shards.catalog import CATALOG_NAME
from linerate.shards.errors import UserError, show_bytes
from linerate.shards.plan import HEADER_NAME as PLAN_HEADER_NAME

WORK_NAME = ".pack"
TARS_NAME = "tars"
# What flock says in some network folders.
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})
# What may lie in a folder whose catalog.json was lost.
_OURS = re.compile(r"[A-Za-z0-9_-]+-\d{6}\.(tar|idx|parquet)|(shards|rejected|pack_stats)\.parquet|\..*\.tmp")


def is_ours(name: str) -> bool:
    """May a file of this name lie in a folder of shards?"""
    return _OURS.fullmatch(name) is not None


def claim_folder(out: Path, *, sources: Sequence[Path | str]) -> bool:
    """Make `out` where it is missing (returns True), refuse it where it holds something else."""
    for source in sources:
        if isinstance(source, Path) and source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise UserError(f"OUT {out} lies inside the source {source}; give a folder beside it")
    if out.exists() and not out.is_dir():
        raise UserError(
            f"OUT {out} is a file; give a folder that is new or empty (SOURCE... come first, OUT last)"
        )
    made = not out.exists()
    if not made:
        names = {entry.name for entry in out.iterdir()}
        if not names & {CATALOG_NAME, WORK_NAME} and (foreign := sorted(filterfalse(is_ours, names))):
            some = ", ".join(foreign[:3])
            raise UserError(f"OUT {out} holds something else ({some}); give a folder that is new or empty")
    try:
        (out / WORK_NAME).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"OUT {out} cannot be written ({error.strerror}); give a folder that you may write"
        ) from None
    return made


@contextlib.contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Only one packing run at a time in `out`; the system frees the lock when its process dies."""
    path = out / WORK_NAME / "lock"
    while True:
        path.parent.mkdir(exist_ok=True)
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UserError(
                    f"another `linerate shard pack` ({file.read().strip() or 'just started'}) writes to "
                    f"{out}; wait until it ends, or give another OUT"
                ) from None
            except OSError as error:
                # Some network folders know no locks. There two runs may remove each other's plan and
                # temporary files: one ends with an error, while shards that are whole stay so, since both
                # write the same bytes.
                if error.errno not in NO_LOCKS:
                    raise
            # Whoever held it before may have removed the file that we have just locked.
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield
            return


def require_space(out: Path, *, num_bytes: int) -> None:
    """Raise UserError where the disk has less than this free."""
    free = shutil.disk_usage(out).free
    if num_bytes > free:
        raise UserError(
            f"the shards need about {show_bytes(num_bytes)}, the disk of {out} has {show_bytes(free)} "
            f"free; free some, or give an OUT on another disk"
        )


def remove_stale(out: Path) -> None:
    """Remove the temporary files of runs that are no more. Call it with the lock held."""
    for path in out.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def remove_work(out: Path) -> None:
    """Remove the plan and the lock: nothing is left to take up again."""
    # First what says that there is a plan: killed in between, the next run finds none, not half of one.
    (out / WORK_NAME / PLAN_HEADER_NAME).unlink(missing_ok=True)
    shutil.rmtree(out / WORK_NAME, ignore_errors=True)


def remove_marks(stems: Iterable[Path], out: Path) -> None:
    """Remove the marks of shards without samples, and the plan behind them."""
    for stem in stems:
        stem.with_suffix(".parquet").unlink(missing_ok=True)
    remove_work(out)


def _brought_parts(out: Path) -> Iterator[Path]:
    return (out / WORK_NAME / TARS_NAME).glob("[0-9]*/[0-9]*")


def tidy_folder(out: Path, *, made: bool) -> None:
    """Leave nothing behind that the next run does not need. Call it with the lock held."""
    remove_stale(out)
    # Remote tars that were read whole need not be read again, also for another plan.
    if not (out / WORK_NAME / PLAN_HEADER_NAME).exists() and not any(_brought_parts(out)):
        remove_work(out)
        if made and not any(out.iterdir()):
            out.rmdir()

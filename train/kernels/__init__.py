"""Triton kernels for parts of a step that eager torch does in many passes; each has a torch form beside it.

Nothing here imports triton before a kernel is asked for: a machine without it runs the torch forms.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import torch

ResultT = TypeVar("ResultT")

_log = logging.getLogger("linerate")
given_up: dict[str, str] = {}
"""Modules that run no more in this process, and why."""
_said: set[str] = set()


class Unsuited(ValueError):
    """Tensors that a kernel does not take; its torch form does."""


def on_kernels(
    name: str, device: torch.device, run: Callable[[ModuleType], ResultT], *, otherwise: Callable[[], ResultT]
) -> ResultT:
    """What `run` makes of the module `name` of this package; on a CPU, and where that fails, `otherwise`.

    A failure is said in the log, once. Tensors that are unsuited do not end the kernel's use for others; no
    Triton, or one that cannot compile here, does. Want of memory is passed on.
    """
    if device.type != "cuda" or name in given_up:
        return otherwise()
    try:
        return run(importlib.import_module(f"{__name__}.{name}"))
    except torch.OutOfMemoryError:
        raise
    except Unsuited as error:
        _say(f"no Triton {name} for these tensors, its torch form runs instead: {error}")
    except Exception as error:
        reason, _, _ = str(error).partition("\n")
        given_up[name] = f"{type(error).__name__}: {reason}"
        _say(f"no Triton {name} here, its torch form runs instead: {type(error).__name__}: {error}")
    return otherwise()


def _say(line: str) -> None:
    if line not in _said:
        _said.add(line)
        _log.warning("%s", line)

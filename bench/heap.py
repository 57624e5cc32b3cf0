"""The state of glibc's heap, which decides what a block of tens of MiB costs.

A block above 32 MiB comes from the kernel and returns to it, so each new one faults in all of its pages,
unless work done before has left a hole in the heap that is large enough to be used again. A benchmark that
allocates such blocks must say in which of the two states it ran.
"""

import contextlib
import resource
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def heap_without_holes(num_bytes: int, *, most: int = 64) -> Iterator[None]:
    """Inside, a block of num_bytes comes from the kernel, whatever ran before: its holes are occupied.

    The state inside a MoCo step on a CPU: there cat + cross_entropy at N=256, K=65536 faulted in all
    98,310 pages of its temporaries at every step (resnet18 at 32 px, resnet50 at 64 px).
    """
    plugs: list[torch.Tensor] = []
    while len(plugs) < most and not _is_faulted_in(num_bytes):
        plugs.append(torch.empty(num_bytes, dtype=torch.uint8))
    try:
        yield
    finally:
        plugs.clear()


def page_faults() -> int:
    """Pages that the kernel has handed to this process without reading a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _is_faulted_in(num_bytes: int) -> bool:
    # The first block may touch a hole's pages for the first time; the second one shows whether it is kept.
    for _ in range(2):
        before = page_faults()
        torch.ones(num_bytes, dtype=torch.uint8)
        faults = page_faults() - before
    return faults * resource.getpagesize() >= num_bytes // 2

"""The key forward on a stream of its own: until the loss it and the query forward need nothing of each other.

On a GPU whose kernels do not fill it, the two run side by side. Not with an end-to-end dictionary: there
both forwards move the same running BN statistics.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class KeyStream:
    """Runs work on a CUDA stream beside the current one; without a stream, at once and in place."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream

    def start(self, work: Callable[[], Tensor | None]) -> Callable[[], Tensor | None]:
        """Start it after all that the current stream was given; the result is for that stream to wait for."""
        side = self._stream
        if side is None:
            found = work()
            return lambda: found
        main = torch.cuda.current_stream()
        # The images, and the weights that the last step moved.
        side.wait_stream(main)
        with torch.cuda.stream(side):
            found = work()

        def join() -> Tensor | None:
            main.wait_stream(side)
            if found is not None:
                # Its memory belongs to the side's pool and may not be given away while main reads it. What
                # the side reads is main's, and main frees nothing before this wait.
                found.record_stream(main)
            return found

        return join

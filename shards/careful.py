"""What is done with an image, in a process that may die: for a shard that has killed a worker before.

A decoder that crashes takes its process along and with it the whole shard, in every attempt. Asked image by
image from outside, it is clear which one did it; that one is rejected and all others are as they always are.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

from linerate.shards.image_policy import Taken, make_judge
from linerate.shards.inspect_image import Buffer, RejectedError
from linerate.shards.options import ImagePolicy

# A sound image of the largest permitted size is done in seconds.
IMAGE_LIMIT_S = 120.0
# SIGKILL comes from outside, mostly because memory is short, so it says little about the image.
ATTEMPTS_AFTER_SIGKILL = 3
AnswerT = TypeVar("AnswerT")


class CarefulProcess(Generic[AnswerT]):
    """The function that make() returns there, but an image that kills it, or takes too long, is rejected.

    make: picklable. limit_s: for one image.
    """

    def __init__(self, make: Callable[[], Callable[[Buffer], AnswerT]], *, limit_s: float) -> None:
        self._make = make
        self._limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def close(self) -> None:
        """End the process; the next image would start another."""
        if self._process and self._pipe:
            self._process.kill()
            self._process.wait()
            self._pipe.close()
        self._process = self._pipe = None

    def __call__(self, data: Buffer) -> AnswerT:
        attempts = 1
        while (answer := self._ask(data)) == _Death("SIGKILL") and attempts < ATTEMPTS_AFTER_SIGKILL:
            attempts += 1
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, _Death):
            raise RejectedError("kills the decoder", answer.how)
        return answer

    def _ask(self, data: Buffer) -> AnswerT | Exception | _Death:
        """The answer, the error that was raised there, or what ended the process."""
        if self._process is None or self._pipe is None:
            self._process, self._pipe = _start(self._make)
        try:
            self._pipe.send_bytes(data)
            if not self._pipe.poll(self._limit_s):
                self.close()
                return _Death(f"not done after {self._limit_s:.0f} s")
            answer: AnswerT | Exception = self._pipe.recv()
            return answer
        except (EOFError, OSError):
            code = self._process.wait()
            self.close()
            return _Death(signal.Signals(-code).name if code < 0 else f"its process ended with code {code}")


@dataclass(frozen=True)
class _Death:
    """What ended the process."""

    how: str


@functools.cache
def careful_judge(policy: ImagePolicy) -> CarefulProcess[Taken]:
    """make_judge(policy) so; one for the life of this process."""
    judge = CarefulProcess(functools.partial(make_judge, policy), limit_s=IMAGE_LIMIT_S)
    atexit.register(judge.close)
    return judge


def _start(make: Callable[[], object]) -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = multiprocessing.Pipe()
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", "from linerate.shards.careful import serve; serve()"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "LINERATE_CAREFUL": f"{theirs.fileno()} {pickle.dumps(make).hex()}",
        },
    )
    theirs.close()
    return process, ours


def serve() -> None:
    """The life of the process: an image in, what the function makes of it out, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    number, make = os.environ["LINERATE_CAREFUL"].split()
    pipe = Connection(int(number))
    call = pickle.loads(bytes.fromhex(make))()
    while True:
        try:
            data = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            answer: object = call(data)
        except Exception as error:
            answer = error
        pipe.send(answer)

"""The image policy in a process that may die: for a shard that has killed a worker before.

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
from multiprocessing.connection import Connection

from linerate.shards.image_policy import Taken, make_judge
from linerate.shards.inspect_image import Buffer, RejectedError
from linerate.shards.options import ImagePolicy

# A sound image of the largest permitted size is done in seconds.
IMAGE_LIMIT_S = 120.0
# SIGKILL comes from outside, mostly because memory is short, so it says little about the image.
ATTEMPTS_AFTER_SIGKILL = 3


class CarefulJudge:
    """As make_judge(policy), but an image that kills the process, or takes too long, is rejected."""

    def __init__(self, policy: ImagePolicy) -> None:
        self._policy = policy
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def close(self) -> None:
        """End the process; the next image would start another."""
        if self._process and self._pipe:
            self._process.kill()
            self._process.wait()
            self._pipe.close()
        self._process = self._pipe = None

    def __call__(self, data: Buffer) -> Taken:
        attempts = 1
        while (answer := self._ask(data)) == "SIGKILL" and attempts < ATTEMPTS_AFTER_SIGKILL:
            attempts += 1
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, str):
            raise RejectedError("kills the decoder", answer)
        return answer

    def _ask(self, data: Buffer) -> Taken | Exception | str:
        """The answer, the error that was raised there, or what ended the process."""
        if self._process is None or self._pipe is None:
            self._process, self._pipe = _start(self._policy)
        try:
            self._pipe.send_bytes(data)
            if not self._pipe.poll(IMAGE_LIMIT_S):
                self.close()
                return f"not done after {IMAGE_LIMIT_S:.0f} s"
            answer: Taken | Exception = self._pipe.recv()
            return answer
        except (EOFError, OSError):
            code = self._process.wait()
            self.close()
            return signal.Signals(-code).name if code < 0 else f"its process ended with code {code}"


@functools.cache
def careful_judge(policy: ImagePolicy) -> CarefulJudge:
    """One for the life of this process."""
    judge = CarefulJudge(policy)
    atexit.register(judge.close)
    return judge


def _start(policy: ImagePolicy) -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = multiprocessing.Pipe()
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", "from linerate.shards.careful import serve; serve()"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "LINERATE_CAREFUL": f"{theirs.fileno()} {pickle.dumps(policy).hex()}",
        },
    )
    theirs.close()
    return process, ours


def serve() -> None:
    """The life of the process: an image in, what the policy makes of it out, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    number, policy = os.environ["LINERATE_CAREFUL"].split()
    pipe = Connection(int(number))
    judge = make_judge(pickle.loads(bytes.fromhex(policy)))
    while True:
        try:
            data = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            answer: Taken | Exception = judge(data)
        except Exception as error:
            answer = error
        pipe.send(answer)

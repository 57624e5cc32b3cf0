"""DALI's CPU decoder as judge, in a process of its own, because a decoder may die of a broken image."""

from __future__ import annotations

import atexit
import functools
import os
import select
import signal
import struct
import subprocess
import sys
from typing import IO, Any

from linerate.shards.errors import UserError
from linerate.shards.inspect_image import Buffer, RejectedError

# A sound image of the largest permitted size decodes in seconds.
IMAGE_LIMIT_S = 60.0
START_LIMIT_S = 120.0
_READY = b"ready"


class DaliJudge:
    """Says of one JPEG after another whether DALI decodes it. It owns a process until close()."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        """End the process; check() would start another."""
        self._end()

    def check(self, jpeg: Buffer) -> None:
        """Raises RejectedError for what DALI refuses, dies of, or does not finish; UserError without DALI."""
        process = self._process or self._start()
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(struct.pack("<Q", len(jpeg)))
            process.stdin.write(jpeg)
            process.stdin.flush()
            answer = _receive(process.stdout, IMAGE_LIMIT_S)
        except (EOFError, BrokenPipeError):
            code = self._end()
            raise RejectedError("does not decode in DALI", f"its process ended with {_name(code)}") from None
        except TimeoutError:
            self._end()
            raise RejectedError("does not decode in DALI", f"not done after {IMAGE_LIMIT_S:.0f} s") from None
        if answer:
            raise RejectedError("does not decode in DALI", answer.decode("utf-8", "replace"))

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from linerate.shards.dali_check import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # its decoders print a line for every damaged image
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self._process.stdout
        try:
            first = _receive(self._process.stdout, START_LIMIT_S)
        except (EOFError, TimeoutError):
            first = b"its process ended while starting"
        if first != _READY:
            self._end()
            raise UserError(
                f"--check dali needs DALI, which does not start here ({first.decode('utf-8', 'replace')}); "
                f"install nvidia-dali-cuda130, or use --check decode"
            )
        return self._process

    def _end(self) -> int:
        """Kill the process; its exit code if it had died before."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()
        code = process.wait()
        for stream in (process.stdin, process.stdout):
            if stream:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue
        return code


@functools.cache
def process_judge() -> DaliJudge:
    """One judge for the life of this process: starting DALI takes seconds."""
    judge = DaliJudge()
    atexit.register(judge.close)
    return judge


def _name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"code {code}"


def _receive(stream: IO[bytes], limit_s: float) -> bytes:
    """One answer of the process. Raises EOFError when it died, TimeoutError when it is silent."""
    if not select.select([stream], [], [], limit_s)[0]:
        raise TimeoutError
    head = stream.read(4)
    if len(head) < 4:
        raise EOFError
    return stream.read(struct.unpack("<I", head)[0])


def serve() -> None:
    """The life of the judging process: a length and a JPEG in, an empty answer or the error out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what DALI prints must not reach the answers

    def answer(text: bytes) -> None:
        answers.write(struct.pack("<I", len(text)) + text)
        answers.flush()

    try:
        decode: Any = _build_decoder()
    except Exception as error:
        answer(_one_line(error))
        return
    answer(_READY)
    while len(head := questions.read(8)) == 8:
        jpeg = questions.read(struct.unpack("<Q", head)[0])
        try:
            decode(jpeg)
        except Exception as error:
            answer(_one_line(error))
            decode = _build_decoder()  # the pipeline that raised is not documented to go on
        else:
            answer(b"")


def _build_decoder() -> Any:
    import numpy as np
    from nvidia import dali as untyped

    dali: Any = untyped
    types = dali.types
    pipeline = dali.Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        jpegs = dali.fn.external_source(name="jpegs", dtype=types.UINT8, ndim=1)
        # As training decodes: where EXIF asks for a rotation it is not obeyed.
        pixels = dali.fn.decoders.image(jpegs, device="cpu", output_type=types.RGB, adjust_orientation=False)
        pipeline.set_outputs(pixels)
    pipeline.build()

    def decode(jpeg: bytes) -> None:
        pipeline.feed_input("jpegs", [np.frombuffer(jpeg, np.uint8)])
        pipeline.run()

    return decode


def _one_line(error: BaseException) -> bytes:
    # DALI names the operator and prints a traceback before the one line that says why.
    why = str(error).rsplit("encountered:", 1)[-1]
    lines = [line.strip() for line in why.splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200].encode()

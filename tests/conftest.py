"""Every test process waits for its threads asleep; see `linerate.__main__.let_threads_sleep`.

A process has one server of forks, whoever starts it first: it holds what workers of loaders need, so that
none of them imports torch by itself.

Without a GPU Triton's kernels run in its interpreter, which must be chosen before triton is first imported.
"""

import multiprocessing
import os
from pathlib import Path

from linerate.__main__ import let_threads_sleep

let_threads_sleep()
multiprocessing.get_context("forkserver").set_forkserver_preload(["linerate.pipeline.torch_views"])
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

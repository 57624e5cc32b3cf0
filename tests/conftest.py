"""Every test process waits for its threads asleep; see `linerate.__main__.let_threads_sleep`.

Without a GPU Triton's kernels run in its interpreter, which must be chosen before triton is first imported.
"""

import os
from pathlib import Path

from linerate.__main__ import let_threads_sleep

let_threads_sleep()
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from linerate.shards.errors import UserError
from linerate.train.watchdog import EXIT_CODE, Watchdog, is_lost_peer


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@contextlib.contextmanager
def watched(stacks: Path, clock: Clock, codes: list[int]):  # type: ignore[no-untyped-def]
    yield Watchdog(
        10, where=lambda: "rank 3 after step 7", stacks=stacks, grace_s=0, clock=clock, leave=codes.append
    )


def test_a_rank_that_starves_writes_its_place_and_its_stacks_and_leaves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, codes = Clock(), list[int]()
    with watched(tmp_path / "new" / "stacks.txt", clock, codes) as watchdog:
        clock.now_s = 9
        watchdog.check()
        assert codes == []
        clock.now_s = 10
        watchdog.check()
    assert codes == [EXIT_CODE]
    line = capsys.readouterr().err
    assert "error: rank 3 after step 7 has had no batch for 10 s" in line
    assert "--resume continues" in line
    written = (tmp_path / "new" / "stacks.txt").read_text()
    assert written.startswith(line)
    assert "test_a_rank_that_starves" in written


def test_a_batch_or_a_pause_starts_the_time_anew(tmp_path: Path) -> None:
    clock, codes = Clock(), list[int]()
    with watched(tmp_path / "stacks.txt", clock, codes) as watchdog:
        clock.now_s = 9
        watchdog.pat()
        clock.now_s = 18
        watchdog.check()
        with watchdog.paused():
            clock.now_s = 100
            watchdog.check()
        clock.now_s = 109
        watchdog.check()
    assert codes == []


def test_a_folder_that_cannot_be_written_keeps_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    clock, codes = Clock(), list[int]()
    with watched(tmp_path / "file" / "stacks.txt", clock, codes) as watchdog:
        clock.now_s = 10
        watchdog.check()
    assert codes == [EXIT_CODE]


def test_a_process_whose_loop_hangs_ends_with_75(tmp_path: Path) -> None:
    code = (
        "import time, pathlib\n"
        "from linerate.train.watchdog import Watchdog\n"
        "def wait_for_ever(): time.sleep(100)\n"
        f"path = pathlib.Path({str(tmp_path / 'stacks.txt')!r})\n"
        "with Watchdog(0.2, where=lambda: 'rank 0', stacks=path, grace_s=0):\n"
        "    wait_for_ever()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 75
    assert "wait_for_ever" in (tmp_path / "stacks.txt").read_text()


def test_without_a_limit_it_never_fires(tmp_path: Path) -> None:
    with Watchdog(0, where=lambda: "rank 0", stacks=tmp_path / "stacks.txt") as watchdog:
        watchdog.pat()


def test_a_lost_peer_is_known_by_the_collectives_error() -> None:
    assert is_lost_peer(dist.DistNetworkError("connection was closed"))
    assert is_lost_peer(
        RuntimeError("[third_party/gloo/transport/tcp/pair.cc:544] Connection closed by peer")
    )
    assert not is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost_peer(UserError("gloo"))


def test_a_rank_that_lost_another_writes_its_place_its_error_and_its_stacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = list[int]()
    with (
        pytest.raises(RuntimeError, match="gloo"),
        watched(tmp_path / "stacks.txt", Clock(), codes) as watchdog,
        watchdog,
    ):
        raise RuntimeError("gloo: connection closed")
    assert codes == [EXIT_CODE]
    assert "rank 3 after step 7 has lost another rank (gloo: connection closed)" in capsys.readouterr().err
    written = (tmp_path / "stacks.txt").read_text()
    assert "Traceback" in written
    assert "RuntimeError: gloo: connection closed" in written
    with (
        pytest.raises(ValueError, match="ours"),
        watched(tmp_path / "no", Clock(), codes) as watchdog,
        watchdog,
    ):
        raise ValueError("ours")
    assert codes == [EXIT_CODE]

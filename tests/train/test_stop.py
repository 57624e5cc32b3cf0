import os
import signal
import threading
import time

import pytest

from linerate.train import stop as stop_module
from linerate.train.stop import SIGNALS, StopRequest, exit_code, stop_on_signals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_becomes_a_request(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal is number
    assert signal.getsignal(number) is before


def test_only_ctrl_c_is_a_failure_to_a_scheduler() -> None:
    assert [exit_code(number) for number in (*SIGNALS, None)] == [130, 0, 0, 0]


def _interrupt_twice() -> StopRequest:
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    return stop


def test_a_ctrl_c_that_a_launcher_repeats_is_one_request() -> None:
    assert _interrupt_twice().signal is signal.SIGINT


def test_a_later_ctrl_c_interrupts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_module, "REPEAT_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        _interrupt_twice()


def test_outside_the_main_thread_it_is_never_set() -> None:
    found: list[bool] = []

    def work() -> None:
        with stop_on_signals() as stop:
            found.append(bool(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def test_a_wait_is_told_at_once_and_only_once() -> None:
    acts: list[str] = []
    with stop_on_signals() as stop:
        with stop.at_once(lambda: acts.append("before")):
            pass
        with stop.at_once(lambda: acts.append("in it")):
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert acts == ["in it"]
        with stop.at_once(lambda: acts.append("after")):
            assert acts == ["in it", "after"]
    assert stop.signal is signal.SIGUSR1


def test_what_is_saved_waits_for_a_loader_only_so_long(capsys: pytest.CaptureFixture[str]) -> None:
    left: list[int] = []
    gone = threading.Event()

    def leave(code: int) -> None:
        left.append(code)
        gone.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        gone.clear()
        stop = StopRequest(leave=leave)
        stop.take(number)
        stop.leave_within(0.0, after="step-000000005.pt is whole")
        assert gone.wait(10)
    assert left == [0, 130]
    line = "linerate: stopped by SIGTERM; step-000000005.pt is whole; the loader did not end"
    assert capsys.readouterr().err.splitlines()[0] == line
    stop = StopRequest(leave=left.append)
    stop.leave_within(0.05, after="")
    stop.stay()
    time.sleep(0.1)
    assert left == [0, 130]


def test_another_thread_hears_a_signal_that_no_handler_has_taken_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StopRequest, "take", lambda *_: None)
    with stop_on_signals() as stop:
        assert stop.heard() is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signal is None
        assert stop.heard() is signal.SIGUSR1
    assert stop.heard() is None
    assert signal.set_wakeup_fd(-1) == -1

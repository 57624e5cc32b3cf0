import os
import signal
import threading

import pytest

from linerate.train import stop as stop_module
from linerate.train.stop import StopRequest, stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_becomes_a_request(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal is number
    assert signal.getsignal(number) is before


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

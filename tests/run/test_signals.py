from __future__ import annotations

import signal
import threading

import pytest

from lumina.run.signals import StopRequest


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_first_signal_asks_and_the_second_interrupts(name: str) -> None:
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(getattr(signal, name))
        assert stop.requested == getattr(signal, name)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_earlier_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_in_another_thread_it_does_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    requests: list[StopRequest] = []

    def work() -> None:
        with StopRequest() as stop:
            assert signal.getsignal(signal.SIGTERM) == before
            requests.append(stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [request.requested for request in requests] == [0]

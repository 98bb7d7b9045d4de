import contextlib
import os
import signal
import threading

import pytest

from sparsekv.signals import StopSignal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_is_remembered_and_the_second_acts(number):
    acted = []
    before = signal.signal(number, lambda *received: acted.append(received[0]))
    try:
        with StopSignal() as stop:
            assert stop.number is None
            os.kill(os.getpid(), number)
            assert stop.number == number
            assert not acted
            os.kill(os.getpid(), number)
            assert acted == [number]
        os.kill(os.getpid(), number)
        assert acted == [number, number]
    finally:
        signal.signal(number, before)


def test_signals_are_given_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(RuntimeError), StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) == before


def test_another_thread_is_left_alone():
    stop, errors = StopSignal(), []

    def watch():
        try:
            with stop:
                pass
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert not errors

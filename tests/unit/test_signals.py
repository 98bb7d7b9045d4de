import contextlib
import os
import signal
import threading
import time

import pytest

from sparsekv.signals import ECHO, StopSignal


@pytest.fixture
def acted():
    """What reaches the handlers of before."""
    acted = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *received: acted.append(received[0])) for number in numbers]
    yield acted
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def send(number: int):
    os.kill(os.getpid(), number)


def pass_time(monkeypatch, seconds: float):
    now = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now + seconds)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_is_remembered(acted, number):
    with StopSignal() as stop:
        assert stop.number is None
        send(number)
        assert stop.number == number
        assert not acted
    send(number)
    assert acted == [number]


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_may_be_repeated(acted, monkeypatch, first):
    with StopSignal() as stop:
        send(first)
        for later in (0, ECHO + 1, 60):
            pass_time(monkeypatch, later)
            send(signal.SIGTERM)
        assert stop.number == first
    assert not acted


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_ctrl_c_acts_unless_it_is_an_echo(acted, monkeypatch, first):
    with StopSignal():
        send(first)
        send(signal.SIGINT)
        assert not acted
        pass_time(monkeypatch, ECHO + 1)
        send(signal.SIGINT)
        assert acted == [signal.SIGINT]


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

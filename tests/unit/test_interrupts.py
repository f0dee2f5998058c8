"""Signals become exceptions of the main thread, in code that must not be cut in two only after it."""

import signal
import threading

import pytest

from cogvideo.interrupts import postponed_signals, signals_as_exceptions

pytestmark = pytest.mark.usefixtures("default_signals")


def test_a_signal_in_postponed_code_is_raised_after_it() -> None:
    done = []
    with signals_as_exceptions() as received:
        with pytest.raises(SystemExit) as caught, postponed_signals():
            with postponed_signals():
                signal.raise_signal(signal.SIGTERM)
                done.append("inner")
            done.append("outer")
        assert caught.value.code == 143 and done == ["inner", "outer"] and received == [signal.SIGTERM]
        with postponed_signals():
            pass  # nothing is left to raise


def test_a_signal_wins_over_an_error_of_the_code_that_it_waited_for() -> None:
    with signals_as_exceptions(), pytest.raises(KeyboardInterrupt), postponed_signals():
        signal.raise_signal(signal.SIGINT)
        raise ValueError


def test_other_threads_do_not_postpone_what_the_main_thread_gets() -> None:
    inside, end = threading.Event(), threading.Event()

    def wait() -> None:
        with postponed_signals():
            inside.set()
            end.wait(10)

    thread = threading.Thread(target=wait)
    thread.start()
    inside.wait(10)
    try:
        with signals_as_exceptions(), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        end.set()
        thread.join()

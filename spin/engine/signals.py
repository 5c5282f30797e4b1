"""Signals that ask training to stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(Exception):
    """Training was asked to stop and has written a checkpoint."""


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Record SIGTERM, SIGINT and SIGHUP instead of exiting; the list is non-empty once one arrives.

    A signal that is ignored (a script's background job ignores SIGINT) stays ignored. Outside of the main
    thread, where Python has no signal handlers, nothing is recorded.
    """
    received: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if main else ()
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

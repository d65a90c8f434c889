"""How a run that is asked to stop ends: SIGTERM, Ctrl-C, or a terminal that goes away."""

import os
import signal
from collections.abc import Callable
from typing import Any


class Stopped(Exception):
    """The run was asked to stop, and did so after a whole step; the message says how to go on."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def on_stop_signals(handler: Callable[[int, Any], None]) -> None:
    """Has `handler` called at what asks a run to stop; under nohup, the end of a terminal does not."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def stop_at_once(number: int, frame: Any) -> None:
    """For the time before the first step. Raises nothing: an exception in what starts a thread leaves one behind whose
    end Python waits for in vain."""
    os.write(2, b"stopped before its first step: nothing new to save\n")
    os._exit(128 + number)

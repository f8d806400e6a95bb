"""Ctrl-C, SIGTERM and SIGHUP end a command in an orderly way, with a message and an exit code.

A signal becomes a `KeyboardInterrupt` in the main thread, so that every with-block on the way out
removes what it has begun and ends the processes it has started. Others that follow at once, of an
impatient hand or from a terminal that closes, do not disturb that. What is ignored (SIGHUP below
`nohup`, SIGINT in the background of a script) stays ignored. Python drops an exception that is
raised in a finalizer; so the next event of the pipeline raises it once more (`Signals.pass_on`).
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType

from cptq.types import Emit, Event

#: SIGHUP does not exist everywhere
NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
#: seconds after a signal in which others count as the same
PATIENCE = 10.0


class Signals:
    """The signal that ends this command, if there was one.

    `ignored`: from now on, as the command has ended and says so.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.ignored = False
        self._since = 0.0

    @property
    def exit_code(self) -> int:
        """What a shell reports of a process that a signal ended: 130, 143 or 129."""
        return 128 + (self.received or signal.SIGINT)

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt, unless the last signal is carried out just now.

        Raises:
            KeyboardInterrupt: always, but for a signal that follows at once, or is ignored.
        """
        if self.ignored:
            return
        now = monotonic()
        if self.received is not None and now - self._since < PATIENCE:
            return
        self.received, self._since = signal.Signals(number), now
        raise KeyboardInterrupt

    def pass_on(self, emit: Emit) -> Emit:
        """Return an `emit` that ends a pipeline which has not noticed the signal.

        One that is on its way out may go on emitting.
        """

        def check_and_emit(event: Event) -> None:
            if self.received is not None and not isinstance(sys.exc_info()[1], KeyboardInterrupt):
                raise KeyboardInterrupt
            emit(event)

        return check_and_emit


@contextmanager
def catch_signals() -> Iterator[Signals]:
    """Let signals end what runs inside; afterwards they do what they did before.

    In other threads than the main one, where Python delivers no signal, nothing changes.
    """
    found = Signals()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in NAMES:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, found.receive)
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

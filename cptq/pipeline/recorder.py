"""What a run must remember beside its results: every notice, and the seconds of each stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from cptq.types import Emit, Event, Notice


class Recorder:
    """Passes events on and keeps the notices; times stages."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self.notices: list[Notice] = []
        self._spent: dict[str, float] = {}
        self._began: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Notice):
            if event in self.notices:
                return  # once is enough, however many passes meet it
            self.notices.append(event)
        self._emit(event)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to the stage `name`."""
        self._began[name] = time.perf_counter()
        try:
            yield
        finally:
            began = self._began.pop(name)
            self._spent[name] = self._spent.get(name, 0.0) + time.perf_counter() - began

    @property
    def timings(self) -> dict[str, float]:
        """Stage -> seconds; of a stage that is under way, those until now."""
        now = time.perf_counter()
        running = {name: now - began for name, began in self._began.items()}
        names = dict.fromkeys([*self._spent, *running])
        return {name: self._spent.get(name, 0.0) + running.get(name, 0.0) for name in names}

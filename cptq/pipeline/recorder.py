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
        self.timings: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Notice):
            if event in self.notices:
                return  # once is enough, however many passes meet it
            self.notices.append(event)
        self._emit(event)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to the stage `name`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - began

"""Progress events on stderr: bars on a terminal, now and then a line in a log."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column

from cptq.report.formatting import format_seconds
from cptq.types import Progress

#: seconds between two lines of one stage in a log
EVERY = 30.0


class Display(Protocol):
    """Where progress is shown."""

    def update(self, event: Progress) -> None:
        """Show one event."""

    def close(self) -> None:
        """Nothing more comes."""


class Nothing:
    """For `--format quiet`."""

    def update(self, event: Progress) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Nothing was open."""


class Bars:
    """One bar a stage, with the remaining time, then with the time it took."""

    def __init__(self, console: Console) -> None:
        self.bar = Bar(
            TextColumn(
                "{task.description}",
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
                markup=False,
            ),
            BarColumn(bar_width=18),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
            expand=True,
            refresh_per_second=4,
        )
        self.tasks: dict[str, TaskID] = {}
        self.current: str | None = None

    def update(self, event: Progress) -> None:
        """Move the stage's bar; a new stage ends the one before."""
        if event.stage != self.current:
            self._finish()
            self.bar.start()
            self.current = event.stage
        if event.stage not in self.tasks:
            self.tasks[event.stage] = self.bar.add_task(event.stage, total=event.total)
        words = f"{event.stage}: {event.message}" if event.message else event.stage
        task = self.tasks[event.stage]
        self.bar.update(task, completed=event.done, total=event.total, description=words)

    def _finish(self) -> None:
        """Stop the clock of a stage when the next begins; one of unknown length is then whole."""
        if self.current is None:
            return
        task = self.tasks[self.current]
        row = next(row for row in self.bar.tasks if row.id == task)
        if row.total is None:
            whole = max(row.completed, 1)
            self.bar.update(task, total=whole, completed=whole)
        self.bar.update(task, description=self.current)
        self.bar.stop_task(task)

    def close(self) -> None:
        """Leave the bars as they are."""
        self._finish()
        self.bar.stop()


class Lines:
    """For a log: a line when a stage begins and ends, and every half minute between."""

    def __init__(
        self, write: Callable[[str], None], clock: Callable[[], float] = monotonic
    ) -> None:
        self.write, self.clock = write, clock
        self.stage: str | None = None
        self.started = self.told = 0.0
        self.ended = False

    def update(self, event: Progress) -> None:
        """Tell what is new about it."""
        now = self.clock()
        if event.stage != self.stage:
            self.stage, self.started, self.told, self.ended = event.stage, now, now, False
            self.write(
                f"{event.stage} ..." if not event.message else f"{event.stage}: {event.message}"
            )
        if event.total is not None and event.done >= event.total:
            self._end(now)
        elif now - self.told >= EVERY:
            self.told = now
            self.write(f"{event.stage} {event.done}" + self._rest(event, now))

    def _end(self, now: float) -> None:
        if not self.ended:
            self.ended = True
            self.write(f"{self.stage} done in {format_seconds(now - self.started)}")

    def _rest(self, event: Progress, now: float) -> str:
        if not event.total or not event.done:
            return ""
        left = (now - self.started) * (event.total - event.done) / event.done
        return f"/{event.total}, about {format_seconds(left)} left"

    def close(self) -> None:
        """Lines need no end."""

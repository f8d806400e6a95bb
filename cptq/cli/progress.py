"""Progress on stderr: bars on a terminal, a line from time to time in a log.

In a log a stage that says nothing for `LOG_INTERVAL` is reported all the same, so that whoever
waits sees that it is alive: a thread writes that line, which ends with the process.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Lock, Thread
from time import monotonic
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from cptq.report.formatting import format_seconds
from cptq.types import Progress

#: seconds between two lines of one stage in a log
LOG_INTERVAL = 30.0


class ProgressDisplay(Protocol):
    """Where progress is shown."""

    def update(self, event: Progress) -> None:
        """Show one event."""

    def close(self) -> None:
        """End the display."""


class NoProgress:
    """No display, for `--format quiet`."""

    def update(self, event: Progress) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Do nothing."""


class ProgressBars:
    """One bar per stage, with the remaining time and at the end with the time it took."""

    def __init__(self, console: Console) -> None:
        self.bars = RichProgress(
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
        """Advance the bar of the stage; a new stage ends the previous one."""
        if event.stage != self.current:
            self._finish_stage()
            self.bars.start()
            self.current = event.stage
        if event.stage not in self.tasks:
            self.tasks[event.stage] = self.bars.add_task(event.stage, total=event.total)
        words = f"{event.stage}: {event.message}" if event.message else event.stage
        task = self.tasks[event.stage]
        self.bars.update(task, completed=event.done, total=event.total, description=words)

    def _finish_stage(self) -> None:
        """Stop the clock of the current stage; one of unknown length is then complete."""
        if self.current is None:
            return
        task = self.tasks[self.current]
        row = next(row for row in self.bars.tasks if row.id == task)
        if row.total is None:
            whole = max(row.completed, 1)
            self.bars.update(task, total=whole, completed=whole)
        self.bars.update(task, description=self.current)
        self.bars.stop_task(task)

    def close(self) -> None:
        """Stop the bars and leave them on the screen."""
        self._finish_stage()
        self.bars.stop()


class ProgressLog:
    """A line when a stage begins, when it ends, and every half minute in between.

    `beats`: start the thread that reports a stage without events.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        clock: Callable[[], float] = monotonic,
        *,
        beats: bool = False,
    ) -> None:
        self.write, self.clock = write, clock
        self.stage: str | None = None
        self.started = self.logged = 0.0
        self.ended = False
        self._lock, self._stop = Lock(), Event()
        if beats:
            Thread(target=self._beat_on, daemon=True).start()

    def update(self, event: Progress) -> None:
        """Write a line if the stage begins or ends, or if the last line is old."""
        with self._lock:
            self._update(event)

    def beat(self) -> None:
        """Write that the stage goes on, if the last line is old."""
        with self._lock:
            now = self.clock()
            if self.stage and not self.ended and now - self.logged >= LOG_INTERVAL:
                self.logged = now
                self.write(f"{self.stage}: still at work, {format_seconds(now - self.started)}")

    def _beat_on(self) -> None:
        while not self._stop.wait(LOG_INTERVAL / 3):
            self.beat()

    def _update(self, event: Progress) -> None:
        now = self.clock()
        if event.stage != self.stage:
            self.stage, self.started, self.logged, self.ended = event.stage, now, now, False
            self.write(
                f"{event.stage} ..." if not event.message else f"{event.stage}: {event.message}"
            )
            if event.total is not None and event.done >= event.total and event.message:
                self.ended = True  # a stage that comes back with its last word took no time
        if event.total is not None and event.done >= event.total:
            self._end_stage(now)
        elif now - self.logged >= LOG_INTERVAL:
            self.logged = now
            self.write(f"{event.stage} {event.done}" + self._estimate_rest(event, now))

    def _end_stage(self, now: float) -> None:
        if not self.ended:
            self.ended = True
            self.write(f"{self.stage} done in {format_seconds(now - self.started)}")

    def _estimate_rest(self, event: Progress, now: float) -> str:
        if not event.total or not event.done:
            return ""
        left = (now - self.started) * (event.total - event.done) / event.done
        return f"/{event.total}, about {format_seconds(left)} left"

    def close(self) -> None:
        """End the thread."""
        self._stop.set()


class ProgressTrace:
    """Every event as a line with the seconds since the start, for --verbose."""

    def __init__(
        self, write: Callable[[str], None], clock: Callable[[], float] = monotonic
    ) -> None:
        self.write, self.clock, self.began = write, clock, clock()

    def update(self, event: Progress) -> None:
        """Write the event."""
        of = "" if event.total is None else f"/{event.total}"
        message = f": {event.message}" if event.message else ""
        self.write(f"[{self.clock() - self.began:8.2f} s] {event.stage} {event.done}{of}{message}")

    def close(self) -> None:
        """Do nothing."""

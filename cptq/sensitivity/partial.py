"""What is left of a measurement that was interrupted: tables that lack units, and say so.

A partial table is for reading alone. Its details hold `partial`, its file is called
`METRIC.partial.json`, and whoever would allocate bits by it is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping

from cptq.types import SensitivityTable

PARTIAL = "partial"


class InterruptedMeasurementError(KeyboardInterrupt):
    """Ctrl-C while units were being scored.

    Attributes:
        tables: metric -> partial table of the units that every metric has scored.
        done, total: how many units those are, and how many there are.
    """

    def __init__(self, tables: Mapping[str, SensitivityTable], done: int, total: int) -> None:
        super().__init__()
        self.tables = tables
        self.done = done
        self.total = total


def marks(done: int, total: int) -> dict[str, dict[str, int]]:
    """What marks the details of a partial table."""
    return {PARTIAL: {"units": done, "of": total}}

"""One measurement serves runtimes that store scales in other ways."""

from __future__ import annotations

from cptq.pipeline.files import fill_in_scales
from cptq.types import Candidate, Event, Notice, SensitivityTable


def table(**scores: float) -> SensitivityTable:
    """A table of one unit, by the labels of candidates with `_` for `-`."""
    row = {Candidate.parse(label.replace("_", "-")): score for label, score in scores.items()}
    return SensitivityTable(
        metric="output",
        score_unit="nats",
        scores={"a": row},
        per_unit={"a": 1.0},
        per_block={0: 1.0},
        model_fingerprint="f",
        calibration_fingerprint="c",
        seed=0,
        tokens=1,
        seconds=0.0,
    )


def fill(known: SensitivityTable, *labels: str) -> tuple[dict[str, float], list[str]]:
    heard: list[Event] = []
    asked = {"a": [Candidate.parse(label) for label in labels]}
    found = fill_in_scales(known, asked, heard.append)
    told = [event.message for event in heard if isinstance(event, Notice)]
    return {c.label: score for c, score in found.scores["a"].items()}, told


def test_a_score_stands_for_other_scales_of_the_same_width_and_bytes() -> None:
    scores, told = fill(table(w4g64=1.0, w3g32_e4m3=2.0), "w4g32-row", "w3g64", "w3g32-row")
    assert scores["w4g32-row"] == 1.0
    assert scores["w3g64"] == scores["w3g32-row"] == 2.0
    assert len(told) == 1
    assert "w4g32-row by that of w4g64" in told[0]


def test_what_is_measured_is_taken_and_nothing_is_said() -> None:
    known = table(w4g64=1.0, w4g32_row=0.5)
    scores, told = fill(known, "w4g64", "w4g32-row")
    assert scores == {"w4g64": 1.0, "w4g32-row": 0.5}
    assert told == []


def test_other_widths_groups_and_grids_are_not_alike() -> None:
    scores, told = fill(
        table(w4g64=1.0), "w3g64", "w4g32", "w4g64-asym", "w4g64-s50", "w4g64-row", "w8g32-row"
    )
    assert scores == {"w4g64": 1.0}
    assert told == []

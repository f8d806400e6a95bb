"""What pruning did, unit by unit and to the whole model, from the details of a `pruning` table."""

from __future__ import annotations

from cptq.report import words
from cptq.report.summary import Summary
from cptq.report.table import Table
from cptq.types import SensitivityTable

METRIC = "pruning"


def pruning_tables(summary: Summary) -> list[Table]:
    """The loss over sparsity of the whole model with its knee, and of each unit with its area."""
    measured = summary.sensitivity.get(METRIC)
    if measured is None or "curve" not in measured.details:
        return []
    return [_whole(measured), _units(measured)]


def _whole(measured: SensitivityTable) -> Table:
    curve = measured.details.get("whole_model_curve", {})
    knee = measured.details.get("essential_sparsity")
    found = f"{knee:.0%} of the weights" if knee is not None else "none: the curve does not bend"
    return Table(
        title="All units pruned together",
        columns=("sparsity", "loss"),
        rows=tuple((f"{float(p):.0%}", words.number(loss)) for p, loss in curve.items()),
        right=("sparsity", "loss"),
        note=f"essential sparsity, where the curve bends: {found}; loss in {measured.score_unit}",
    )


def _units(measured: SensitivityTable) -> Table:
    sparsities = [f"{p:.0%}" for p in measured.details["sparsities"]]
    areas = measured.details["area"]
    rows = tuple(
        (unit, *map(words.number, curve), words.number(areas[unit]))
        for unit, curve in measured.details["curve"].items()
        if unit in measured.per_unit
    )
    return Table(
        title="Units pruned one at a time",
        columns=("unit", *sparsities, "area"),
        rows=rows,
        right=(*sparsities, "area"),
        folded=True,
        note=f"loss at each sparsity in {measured.score_unit}, and the area under the curve from 0",
    )

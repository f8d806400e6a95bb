"""Tables and the scatter plot of a validation: scores versus measured divergence.

The tables show how well metrics rank units, what their plans cost, and how sensitivity depends on
depth. The plot has one panel per metric and one dot per pair of unit and candidate, coloured by bit
width. A score that ranks well makes a rising band; one that only reflects the bit width makes one
flat cloud per colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from cptq.report.formatting import (
    Table,
    format_number,
    format_seconds,
    format_signed,
    format_with_error,
    tabulate_pairs,
)
from cptq.report.svg import (
    Figure,
    Scale,
    choose_scale,
    draw_levels,
    escape_text,
    format_tick,
    tag,
    wrap_svg,
)
from cptq.types import Agreement, Interval, Pair, PlanTrial, Validation

DEPTHS = ("first", "middle", "last")
#: pixels of a panel, and panels in a row
PANEL, HEIGHT, ACROSS = 320.0, 250.0, 3
LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 34.0, 38.0


def build_validation_tables(validation: Validation | None) -> list[Table]:
    """Build all tables of a validation, the main results first; empty ones are omitted."""
    if validation is None:
        return []
    tables = [
        build_rank_table(validation),
        build_pooled_table(validation),
        build_plan_table(validation),
        build_regret_table(validation),
        build_depth_table(validation),
        build_text_table(validation),
        build_trial_table(validation),
    ]
    return [table for table in tables if table is not None and table.rows]


def build_rank_table(validation: Validation) -> Table:
    """Build the table of rank correlations among pairs of equal bit width, best first."""
    ranked = sorted(validation.agreements, key=lambda row: -_replace_nan(row.spearman_within.value))
    rows = tuple(
        (
            row.metric,
            format_interval(row.spearman_within),
            format_interval(row.kendall_within),
            format_seconds(row.seconds) if row.seconds else "-",
        )
        for row in ranked
    )
    return Table(
        title="Rank correlation with measured divergence, within each bit width",
        columns=("metric", "Spearman", "Kendall", "time alone"),
        rows=rows,
        right=("time alone",),
        note=f"{len(validation.pairs)} pairs of unit and width, each unit compressed alone "
        f"({validation.compressor}), {validation.judge_tokens:,} tokens; mean over the widths; "
        f"95% bootstrap intervals, {validation.resamples} resamples of units with all their pairs",
        leading=True,
    )


def build_pooled_table(validation: Validation) -> Table:
    """Build the table of rank correlations over all bit widths."""
    rows = tuple(
        (row.metric, format_interval(row.spearman_pooled), format_interval(row.kendall_pooled))
        for row in validation.agreements
    )
    return Table(
        title="Rank correlation with measured divergence, all bit widths",
        columns=("metric", "Spearman", "Kendall"),
        rows=rows,
        note="any score that increases as bits decrease correlates well here",
    )


def _replace_nan(value: float) -> float:
    """Return a value that sorts after every correlation in place of NaN."""
    return value if value == value else -2.0


def format_interval(value: Interval) -> str:
    """Format a number and its interval: `0.93 (0.88 to 0.96)`."""
    if value.value != value.value:
        return "-"
    return f"{value.value:.2f} ({value.low:.2f} to {value.high:.2f})"


def _list_targets(trials: Sequence[PlanTrial]) -> list[str]:
    return list(dict.fromkeys(trial.target for trial in trials))


def _list_plans(trials: Sequence[PlanTrial]) -> list[str]:
    return list(dict.fromkeys(trial.name for trial in trials))


def find_baseline_trial(validation: Validation, target: str) -> PlanTrial | None:
    """Return the plan of a target that needs no scores, or None."""
    return next((t for t in validation.trials if t.target == target and t.metric is None), None)


def find_reference_trial(validation: Validation, target: str) -> PlanTrial | None:
    """Return the plan of a target made from the reference metric, or None."""
    if validation.reference is None:
        return None
    trials = (t for t in validation.trials if t.metric == validation.reference)
    return next((t for t in trials if t.target == target), None)


def build_plan_table(validation: Validation) -> Table:
    """Build the table of whole-model divergence by plan and target, also relative to baseline."""
    targets = _list_targets(validation.trials)
    known = {(trial.name, trial.target): trial for trial in validation.trials}
    rows = []
    for name in _list_plans(validation.trials):
        cells = []
        for target in targets:
            trial, base = known.get((name, target)), find_baseline_trial(validation, target)
            cells.append("-" if trial is None else _format_ratio(trial, base))
        rows.append((name, *cells))
    return Table(
        title="Whole-model divergence at equal size",
        columns=("plan", *targets),
        rows=tuple(rows),
        right=tuple(targets),
        note=f"{validation.unit} from the dense model, {validation.compressor}; in brackets: ratio "
        "to the baseline plan even (one width everywhere, and one step more for units spread "
        "evenly over depth as long as they fit)",
        leading=True,
    )


def _format_ratio(trial: PlanTrial, base: PlanTrial | None) -> str:
    value = format_number(trial.divergence, 3)
    if base is None or not base.divergence or trial is base:
        return value
    return f"{value} ({trial.divergence / base.divergence:.2f})"


def build_regret_table(validation: Validation) -> Table | None:
    """Build the table of regret against the reference plan; empty without one."""
    targets = [t for t in _list_targets(validation.trials) if find_reference_trial(validation, t)]
    known = {(trial.name, trial.target): trial for trial in validation.trials}
    rows = []
    for name in _list_plans(validation.trials):
        cells = []
        for target in targets:
            trial, best = known.get((name, target)), find_reference_trial(validation, target)
            if trial is None or best is None:
                cells.append("-")
            else:
                cells.append(format_signed(trial.divergence - best.divergence, 3))
        rows.append((name, *cells))
    return Table(
        title=f"Regret against the plan of {validation.reference}",
        columns=("plan", *targets),
        rows=tuple(rows) if targets else (),
        right=tuple(targets),
        note=f"{validation.unit}; negative: better than the plan made from single-unit divergences",
    )


def build_depth_table(validation: Validation) -> Table:
    """Build the table of relative sensitivity by depth, measured and by every metric."""
    rows = tuple(
        (name, *(f"{row[d]:.2f}" if d in row else "-" for d in DEPTHS))
        for name, row in validation.depths.items()
    )
    return Table(
        title="Relative sensitivity of the first and last 30% of the blocks",
        columns=("by", *(f"{d} 30%" if d != "middle" else "middle" for d in DEPTHS)),
        rows=rows,
        right=("first 30%", "middle", "last 30%"),
        note="geometric mean of score / average score of the same role and width; above 1: more "
        "sensitive than average",
    )


def build_text_table(validation: Validation) -> Table:
    """Build the table of the texts and their uses."""
    times = [
        (f"time of {name}", format_seconds(value)) for name, value in validation.seconds.items()
    ]
    return tabulate_pairs("Texts", [*validation.texts.items(), *times])


def build_trial_table(validation: Validation) -> Table:
    """Build the table of exact sizes of the plans."""
    rows = tuple(
        (
            trial.target,
            trial.name,
            f"{trial.file_bytes:,}",
            f"{trial.limit_bytes - trial.file_bytes:,}",
            f"{trial.effective_bits:.3f}",
            format_with_error(trial.divergence, trial.stderr),
            "; ".join(trial.notes),
        )
        for trial in validation.trials
    )
    columns = ("target", "plan", "file bytes", "below budget", "bits with scales", validation.unit)
    return Table(
        title="All plans",
        columns=(*columns, "notes"),
        rows=rows,
        right=columns[2:],
        folded=True,
    )


def draw_scatter(validation: Validation | None, ident: str = "validation") -> Figure | None:
    """Draw one panel per metric; None without pairs."""
    if validation is None or not validation.pairs or not validation.agreements:
        return None
    rows = -(-len(validation.agreements) // ACROSS)
    body = "".join(
        tag(
            "g",
            _draw_panel(row, validation),
            transform=f"translate({(k % ACROSS) * PANEL:g} {(k // ACROSS) * HEIGHT:g})",
        )
        for k, row in enumerate(validation.agreements)
    )
    title = "Scores versus measured divergence"
    correlations = "; ".join(
        f"{row.metric} {row.spearman_within.value:.2f}" for row in validation.agreements
    )
    description = f"one dot per unit and width; Spearman within widths: {correlations}"
    size = (min(ACROSS, len(validation.agreements)) * PANEL, rows * HEIGHT)
    bits = sorted({pair.candidate.bits for pair in validation.pairs})
    return Figure(
        ident=ident,
        title=title,
        caption=f"y axis: measured divergence ({validation.unit}); x axis: score; hollow: zero or "
        "negative, drawn at the edge; rho: Spearman within widths, with its 95% interval",
        svg=wrap_svg(body, ident, title, description, size),
        legend=tuple((f"b{width}", f"{width} bits") for width in bits),
    )


def _draw_panel(row: Agreement, validation: Validation) -> str:
    pairs = [p for p in validation.pairs if isfinite(p.truth) and isfinite(p.scores[row.metric])]
    low, high = LEFT, PANEL - RIGHT
    # a scale runs from its bottom pixel to its top one: for x these are left and right
    across = choose_scale([p.scores[row.metric] for p in pairs], top=high, bottom=low)
    upward = choose_scale([p.truth for p in pairs], top=TOP, bottom=HEIGHT - BOTTOM)
    name = tag("text", escape_text(row.metric), class_="name", x=LEFT, y=14.0)
    rho = f"rho {format_interval(row.spearman_within)}"
    legend = tag("text", escape_text(rho), class_="tick", x=LEFT, y=28.0)
    dots = "".join(_draw_dot(p, p.scores[row.metric], across, upward) for p in pairs)
    return name + legend + _draw_axes(across, upward) + dots


def _draw_dot(pair: Pair, score: float, across: Scale, upward: Scale) -> str:
    edge = (across.log and score <= 0) or (upward.log and pair.truth <= 0)
    tip = (
        f"{pair.unit} at {pair.candidate.label}: score {format_number(score)}, "
        f"measured {format_number(pair.truth)}"
    )
    return tag(
        "circle",
        tag("title", escape_text(tip)),
        class_=f"dot b{pair.candidate.bits}{' hollow' if edge else ''}",
        cx=across.locate(score),
        cy=upward.locate(pair.truth),
        r=3.2,
    )


def _draw_axes(across: Scale, upward: Scale) -> str:
    drawing = draw_levels(upward, left=LEFT, right=PANEL - RIGHT, gap=6.0)
    free = 0.0
    for value in across.list_ticks():
        x = across.locate(value)
        drawing += tag("line", class_="grid", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM)
        if x >= free:
            drawing += tag(
                "text",
                format_tick(value),
                class_="tick",
                x=x,
                y=HEIGHT - BOTTOM + 15,
                text_anchor="middle",
            )
            free = x + 44.0
    return drawing

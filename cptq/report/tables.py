"""The tables of a report, from results and sizes to settings and versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cptq.report.before_after import build_before_after_table
from cptq.report.depth import build_accumulation_table
from cptq.report.formatting import (
    Table,
    format_bytes_exact,
    format_count,
    format_number,
    format_p_value,
    format_percent,
    format_plural,
    format_seconds,
    format_signed,
    format_with_error,
    shorten_tasks,
    tabulate_pairs,
)
from cptq.report.parts import build_parts_table
from cptq.report.plans import build_front_table
from cptq.report.protocol import IN_DOMAIN, explain_in_domain, list_protocols, spell_in_domain
from cptq.report.sensitivity_axis import build_depth_table
from cptq.report.sparse import build_sparsity_table
from cptq.report.speed import build_speed_table
from cptq.report.summary import (
    Summary,
    VerificationFacts,
    count_widths,
    group_notices,
    list_unplanned_layers,
    map_layer_choices,
    rank_units,
)
from cptq.report.validation import build_validation_tables
from cptq.types import CalibrationRecord, LayerSpec, PairedDifference, SensitivityTable, SizeReport

TOP = 10
#: with more notices than this, kinds that changed no result are folded
MANY_NOTICES = 30
CHANGED_THE_RESULT = ("warning", "fallback")
PRUNING = "pruning"


def build_tables(summary: Summary) -> Sequence[Table]:
    """Build all tables of a report in order; tables without rows are omitted."""
    tables = [
        build_before_after_table(summary),
        build_parts_table(summary),
        build_speed_table(summary),
        build_evaluation_table(summary),
        build_paired_table(summary.paired),
        build_size_table(summary),
        build_width_table(summary),
        build_sparsity_table(summary),
        build_depth_table(summary) if len(summary.sensitivity) > 1 else None,
        *build_validation_tables(summary.validation),
        *build_notice_tables(summary),
        *(build_top_table(table, summary) for table in summary.sensitivity.values()),
        build_model_table(summary),
        build_calibration_table(summary),
        build_protocol_table(summary),
        *build_pruning_tables(summary),
        build_front_table(summary),
        build_accumulation_table(summary),
        build_score_table(summary),
        build_layer_table(summary),
        *build_run_tables(summary),
    ]
    return [table for table in tables if table is not None and table.rows]


def build_evaluation_table(summary: Summary) -> Table | None:
    """Build the table of results, with the baseline's if they were measured."""
    if not summary.evaluation:
        return None
    compared = bool(summary.baseline)
    marked = any(row.in_domain for row in summary.evaluation)
    rows, tasks = [], shorten_tasks(row.task for row in summary.evaluation)
    for row in summary.comparison.rows:
        value = format_with_error(row.result.value, row.result.stderr)
        cells = [tasks[row.result.task], row.result.metric, value]
        if compared:
            base = format_number(row.baseline.value) if row.baseline else "-"
            cells += [base, format_signed(row.difference, 3), row.verdict]
        cells += [spell_in_domain(row.result)] if marked else []
        rows.append((*cells, row.result.unit))
    extra = [*(("baseline", "difference", "") if compared else ())]
    extra += [IN_DOMAIN] if marked else []
    return Table(
        title="Evaluation",
        columns=("task", "metric", "value", *extra, "unit"),
        rows=tuple(rows),
        right=("value", "baseline", "difference"),
        note="; ".join(_list_evaluation_notes(summary, tasks)),
        leading=True,
    )


def _list_evaluation_notes(summary: Summary, tasks: Mapping[str, str]) -> list[str]:
    baseline = [f"Baseline: {summary.baseline_source}"] if summary.baseline_source else []
    if any(row.in_domain for row in summary.baseline):
        baseline.append("the baseline was calibrated in-domain, too")
    results = summary.evaluation
    return [*baseline, *list_protocols(results, tasks), *explain_in_domain(results)]


def build_paired_table(paired: Sequence[PairedDifference]) -> Table | None:
    """Build the table of differences from the baseline with their intervals; None without any."""
    if not paired:
        return None
    tasks = shorten_tasks(row.task for row in paired)
    rows = [
        (
            tasks[row.task],
            row.metric,
            format_signed(row.difference, 3),
            format_signed(row.interval[0], 3),
            format_signed(row.interval[1], 3),
            format_p_value(row.p_value),
            row.verdict,
        )
        for row in paired
    ]
    return Table(
        title="Difference from the baseline on the same samples",
        columns=("task", "metric", "difference", "from", "to", "p", "verdict"),
        rows=tuple(rows),
        right=("difference", "from", "to", "p"),
        note=_explain_paired(paired, tasks),
        leading=True,
    )


def _explain_paired(paired: Sequence[PairedDifference], tasks: Mapping[str, str]) -> str:
    level = format_percent(paired[0].level)
    methods: dict[str, list[str]] = {}
    for row in paired:
        methods.setdefault(row.method, []).append(row.metric)
    tests = [f"{', '.join(dict.fromkeys(names))}: {method}" for method, names in methods.items()]
    changed = [
        f"{tasks[row.task]} {row.metric}: {format_number(row.lost)} answers lost and "
        f"{format_number(row.gained)} gained of {format_number(row.samples)}"
        for row in paired
        if row.lost is not None
    ]
    legend = (
        f"from, to: {level} confidence interval of the difference; "
        "undecided: too few samples to decide"
    )
    return "; ".join([legend, *tests, *changed])


def build_size_table(summary: Summary) -> Table | None:
    """Build the table of bytes and the three averages of bits per weight."""
    size = summary.size
    if size is None:
        return None
    share = (
        format_percent(size.file_bytes / size.dense_file_bytes) if size.dense_file_bytes else "-"
    )
    rows = [
        ("weight file, dense", format_bytes_exact(size.dense_file_bytes)),
        (f"{size.file}, compressed", f"{format_bytes_exact(size.file_bytes)}, {share} of dense"),
        *_build_budget_rows(summary, size),
        ("nominal bits", f"{size.nominal_bits:.3f} (codes only)"),
        ("effective bits", f"{size.effective_bits:.3f} (compressible weights with their scales)"),
        ("whole-file bits", f"{size.file_bits:.3f} (whole file over all parameters)"),
        *_build_plan_rows(summary),
    ]
    return tabulate_pairs("Size", rows)


def _build_budget_rows(summary: Summary, size: SizeReport) -> list[tuple[str, str]]:
    budget = summary.budget
    if budget is None:
        return []
    left = budget.limit_bytes - size.count_bytes(budget.scope)
    rest = f"{left:,} bytes unused" if left >= 0 else f"{-left:,} bytes over"
    return [("budget", f"{budget.asked} = {budget.limit_text}, {rest}")]


def _build_plan_rows(summary: Summary) -> list[tuple[str, str]]:
    plan = summary.plan
    if plan is None:
        return []
    method = f"{plan.allocator} with {plan.metric} scores" if plan.metric else plan.allocator
    loss = plan.predicted_loss
    return [
        ("plan", method),
        ("predicted loss", format_number(loss) if loss is not None else "not predicted"),
    ]


def describe_verification(facts: VerificationFacts) -> str:
    """Return the result of the reload check in one line."""
    lists = {
        "missing": facts.missing,
        "unexpected": facts.unexpected,
        "mismatched": facts.mismatched,
    }
    bad = [f"{len(names)} {kind}: {', '.join(names[:3])}" for kind, names in lists.items() if names]
    keys = "; ".join(bad) if bad else "no missing, unexpected or mismatched keys"
    if facts.max_abs_difference is None:
        return f"{keys}; outputs not compared"
    if facts.max_abs_difference == 0:
        return f"{keys}; outputs equal"
    return f"{keys}; outputs differ by at most {facts.max_abs_difference:.3g}"


def build_width_table(summary: Summary) -> Table | None:
    """Build the table of layers and weights per candidate."""
    rows = [
        (row.label, str(row.layers), format_count(row.weights), format_percent(row.share))
        for row in count_widths(summary)
    ]
    if not rows:
        return None
    rest = [layer for layer in list_unplanned_layers(summary) if layer.tied_to is None]
    if rest:
        weights = format_count(sum(layer.numel for layer in rest))
        rows.append(("not in the plan", str(len(rest)), weights, ""))
    return Table(
        title="Layers per width",
        columns=("stored as", "layers", "weights", "of planned"),
        rows=tuple(rows),
        right=("layers", "weights", "of planned"),
        note=_explain_labels([label for label, *_ in rows]),
    )


def _explain_labels(labels: Sequence[str]) -> str:
    """Return what the labels in a table mean."""
    known = {
        "w16": "w16: dense",
        "f8": "f8: 8-bit floats",
        "-nl": "nl: levels closer around 0",
        "-iq4nl": "iq4nl: the uneven levels of ggml's IQ4_NL",
        "-row": "row: scales of 6 bits and a factor per row",
        "-e": "e4m3, e5m2: scales are 8-bit floats",
        "-asym": "asym: with zero points",
    }
    found = [text for part, text in known.items() if any(part in label for label in labels)]
    return "; ".join(["w4g64: 4 bits, one scale per 64 inputs; c: one per output channel", *found])


def build_notice_tables(summary: Summary) -> list[Table]:
    """Build the table of notices; of many, those that changed no result go to a folded table."""
    rows = [
        (kind, notice.subject, notice.message)
        for kind, notices in group_notices(summary.notices).items()
        for notice in notices
    ]
    columns = ("kind", "subject", "message")
    if len(rows) <= MANY_NOTICES:
        return [Table(title="Notices", columns=columns, rows=tuple(rows), leading=True)]
    first = tuple(row for row in rows if row[0] in CHANGED_THE_RESULT)
    rest = tuple(row for row in rows if row[0] not in CHANGED_THE_RESULT)
    note = f"{len(rest)} more are listed below"
    return [
        Table(title="Notices", columns=columns, rows=first, note=note, leading=True),
        Table(title="More notices", columns=columns, rows=rest, folded=True),
    ]


def build_top_table(table: SensitivityTable, summary: Summary, count: int = TOP) -> Table:
    """Build the table of the most sensitive units by one metric."""
    units = {unit.name: unit for unit in summary.units}
    rows = [
        (str(rank), name, units[name].role if name in units else "", format_number(score))
        for rank, (name, score) in enumerate(rank_units(table, count), start=1)
    ]
    text = format_plural(table.tokens, "token") if table.tokens else "weights only, no text"
    return Table(
        title=f"Most sensitive by {table.metric}",
        columns=("#", "unit", "role", "score"),
        rows=tuple(rows),
        right=("#", "score"),
        note="; ".join([table.score_unit, text, *_format_cost(table)]),
    )


def _format_cost(table: SensitivityTable) -> list[str]:
    """Return the seconds of a measurement where they are known."""
    return [format_seconds(table.seconds)] if table.seconds else []


def build_model_table(summary: Summary) -> Table:
    """Build the table of the model and the device it ran on."""
    model = summary.model
    return tabulate_pairs(
        "Model",
        [
            ("source", model.source),
            ("kind", f"{model.kind}, family {model.family}"),
            ("parameters", f"{model.parameters:,}"),
            ("blocks", model.blocks or None),
            ("stored as", model.dtype),
            ("dense weights", format_bytes_exact(model.dense_bytes)),
            ("sha256 of the weights", model.fingerprint),
            ("ran on", ", ".join(word for word in (summary.device, summary.dtype) if word)),
            ("activations", summary.activations or None),
            ("seed", summary.seed),
        ],
    )


def build_calibration_table(summary: Summary) -> Table | None:
    """Build the table of the calibration text."""
    record = summary.calibration
    if record is None:
        return None
    amount = f"{record.samples:,} samples of up to {record.seqlen:,}, {record.tokens:,} tokens"
    rows = [
        ("source", record.source),
        ("location", record.origin),
        ("amount", amount),
        ("samples", describe_samples(record)),
        ("seed", record.seed),
        ("sha256 of the tokens", record.fingerprint),
        ("sha256 of the text", record.text_sha256),
        ("notes", "; ".join(record.notes)),
    ]
    return tabulate_pairs("Calibration", rows)


def describe_samples(record: CalibrationRecord) -> str | None:
    """Return what a calibration sample is, in words; None where that was not recorded."""
    if record.pairs:
        return "pairs of sentences"
    if record.documents is None:
        return None
    border = "cross" if record.documents == "joined" else "do not cross"
    start = "begin with the BOS and " if record.bos else "have no BOS and "
    return f"windows {start}{border} the borders of documents"


def build_protocol_table(summary: Summary) -> Table | None:
    """Build the table of samples and data behind each result."""
    rows = [
        (
            f"{row.task} v{row.version}",
            row.metric,
            f"{row.samples:,}",
            "" if row.tokens is None else f"{row.tokens:,}",
            "" if row.seqlen is None else str(row.seqlen),
            f"{row.data_source or ''} {(row.data_sha256 or '')[:12]}".strip(),
            format_seconds(row.seconds),
            "; ".join([*([row.protocol] if row.protocol else []), *row.notes]),
        )
        for row in summary.evaluation
    ]
    columns = ("task", "metric", "samples", "tokens", "seqlen", "data", "time", "notes")
    right = ("samples", "tokens", "seqlen", "time")
    table = Table(
        title="Evaluation protocol", columns=columns, rows=tuple(rows), right=right, folded=True
    )
    return table if rows else None


def build_pruning_tables(summary: Summary) -> list[Table]:
    """Build the tables of loss over sparsity, of the whole model and of each unit."""
    measured = summary.sensitivity.get(PRUNING)
    if measured is None or "curve" not in measured.details:
        return []
    return [_build_whole_model_table(measured), _build_unit_table(measured)]


def _build_whole_model_table(measured: SensitivityTable) -> Table:
    curve = measured.details.get("whole_model_curve", {})
    knee = measured.details.get("essential_sparsity")
    found = f"{knee:.0%} of the weights" if knee is not None else "none, the curve has no knee"
    return Table(
        title="All units pruned together",
        columns=("sparsity", "loss"),
        rows=tuple((f"{float(p):.0%}", format_number(loss)) for p, loss in curve.items()),
        right=("sparsity", "loss"),
        note=f"essential sparsity (knee of the curve): {found}; loss in {measured.score_unit}",
    )


def _build_unit_table(measured: SensitivityTable) -> Table:
    sparsities = [f"{p:.0%}" for p in measured.details["sparsities"]]
    areas = measured.details["area"]
    rows = tuple(
        (unit, *map(format_number, curve), format_number(areas[unit]))
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


def build_score_table(summary: Summary) -> Table | None:
    """Build the table of every unit's score by every metric."""
    tables = list(summary.sensitivity.values())
    if not tables:
        return None
    metrics = tuple(table.metric for table in tables)
    rows = tuple(
        (unit.name, unit.role, *(format_number(table.per_unit.get(unit.name)) for table in tables))
        for unit in summary.units
    )
    columns = ("unit", "role", *metrics)
    return Table(title="All scores", columns=columns, rows=rows, right=metrics, folded=True)


def build_layer_table(summary: Summary) -> Table | None:
    """Build the table of every weight matrix: how it is stored, its bytes and errors."""
    choices, results = map_layer_choices(summary), {row.name: row for row in summary.results}
    rows = []
    for layer in summary.layers:
        choice, result = choices.get(layer.name), results.get(layer.name)
        rows.append(
            (
                layer.name,
                layer.role,
                f"{layer.shape[0]} x {layer.shape[1]}",
                choice.label if choice else layer.dtype,
                "" if result is None else f"{result.nbytes:,}",
                "" if result is None else format_number(result.weight_error, 3),
                "" if result is None else format_number(result.output_error, 3),
                "; ".join([*_list_layer_notes(layer), *(result.notes if result else ())]),
            )
        )
    right = ("shape", "bytes", "weight error", "output error")
    table = Table(
        title="All layers",
        columns=("layer", "role", "shape", "stored as", *right[1:], "notes"),
        rows=tuple(rows),
        right=right,
        folded=True,
    )
    return table if rows else None


def _list_layer_notes(layer: LayerSpec) -> list[str]:
    tied = f"tied to {layer.tied_to}" if layer.tied_to else ""
    fused = f"fused as {layer.fused}" if layer.fused else ""
    return [note for note in (tied, fused, layer.reason or "") if note]


def build_run_tables(summary: Summary) -> list[Table]:
    """Build the tables of times, settings and versions."""
    times = [(stage, format_seconds(value)) for stage, value in summary.timings.items()]
    total = [("total", format_seconds(sum(summary.timings.values())))] if len(times) > 1 else []
    tables = [
        tabulate_pairs("Times", [*times, *total]),
        tabulate_pairs("Settings", _format_settings(summary.settings), folded=True),
        tabulate_pairs("Versions", summary.versions.items(), folded=True),
    ]
    return [table for table in tables if table.rows]


def _format_settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, _format_setting(x)) for name, x in settings.items() if x is not None]


def _format_setting(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

"""What each command prints when it is done: tables for people, a document for programs, and lines
for scripts."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from cptq.cli.console import Console
from cptq.cli.sparkline import draw_sparkline
from cptq.config import AnySettings, InspectSettings
from cptq.report.before_after import build_before_after_table
from cptq.report.bench import BenchOutcome, build_bench_tables
from cptq.report.comparison import (
    CompareOutcome,
    build_cost_table,
    build_difference_table,
    build_front_table,
    build_results_table,
)
from cptq.report.estimate import Estimate, build_estimate_tables
from cptq.report.formatting import (
    Table,
    format_bytes,
    format_number,
    format_seconds,
    tabulate_pairs,
)
from cptq.report.generation import GenerateOutcome
from cptq.report.health import Health, build_health_tables
from cptq.report.methods import MethodsOutcome, build_method_tables
from cptq.report.plans import PlansOutcome, build_explanation_table, build_view_tables
from cptq.report.prospect import build_prospect_tables
from cptq.report.speed import build_speed_table
from cptq.report.summary import (
    AnalyzeOutcome,
    CompressOutcome,
    EvalOutcome,
    Summary,
    convert_to_plain,
    group_notices,
    rank_units,
)
from cptq.report.tables import (
    build_evaluation_table,
    build_paired_table,
    build_size_table,
    build_top_table,
    build_width_table,
    describe_verification,
)
from cptq.report.validation import build_validation_tables
from cptq.types import SensitivityTable

if TYPE_CHECKING:  # these import torch
    from cptq.artifact.inspect import Inspection, LayerFacts
    from cptq.artifact.verify import VerifiedArtifact
    from cptq.pipeline.export import ExportOutcome
    from cptq.pipeline.soup import SoupOutcome

Reported = AnalyzeOutcome | CompressOutcome | EvalOutcome
#: how many of the most sensitive units are listed
TOP = 5
#: with more metrics than this, each has a line instead of a table
MANY = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a command prints in each of the formats human, json and quiet.

    For people, `messages` follow the tables; they go to stderr.
    """

    tables: Iterable[Table | None]
    document: Mapping[str, Any]
    lines: Sequence[str]
    messages: Sequence[str] = ()


def print_outcome(console: Console, command: str, settings: AnySettings, outcome: Any) -> None:
    """Print the outcome of a command in the console's format."""
    output = PRESENTERS[command](settings, outcome)
    if console.output_format == "json":
        console.print_document(dict(output.document))
    elif console.output_format == "quiet":
        for line in output.lines:
            console.print_line(line)
    else:
        console.print_tables(output.tables)
        for message in output.messages:
            console.print_message(message, "dim")


def present_analyze(settings: AnySettings, outcome: AnalyzeOutcome) -> Output:
    """Present the most sensitive units by each metric, and each metric over the blocks."""
    summary = outcome.summary
    scores = list(summary.sensitivity.values())
    few = [build_top_table(table, summary, TOP) for table in scores]
    top = [make_leader_table(scores)] if len(scores) > MANY else few
    checks = [] if summary.validation is None else build_validation_tables(summary.validation)
    validation = [table for table in checks if not table.folded]
    tables = [*top, make_block_table(scores), *validation, make_last_table(outcome)]
    return Output(tables=tables, document=make_document(outcome), lines=[str(outcome.out)])


def present_compress(settings: AnySettings, outcome: CompressOutcome | Estimate) -> Output:
    """Present bytes, bits, widths, quality and speed; of a dry run, its estimate."""
    if isinstance(outcome, Estimate):
        return present_estimate(outcome)
    summary = outcome.summary
    tables = [
        build_size_table(summary),
        build_width_table(summary),
        build_before_after_table(summary),
        build_speed_table(summary),
    ]
    return Output(
        tables=[*tables, make_last_table(outcome)],
        document=make_document(outcome),
        lines=[str(outcome.out)],
    )


def present_estimate(found: Estimate) -> Output:
    """Present what a run would take; for scripts, the most bytes on the disk."""
    document = {"command": "compress", "dry_run": True, **found.to_dict()}
    tables = build_estimate_tables(found)
    return Output(tables=tables, document=document, lines=[str(found.disk.need)])


def present_plan(settings: AnySettings, outcome: PlansOutcome) -> Output:
    """Present the plans, the front and the explanations; for scripts, files or bytes of plans."""
    rows = [
        ("time", format_seconds(sum(outcome.timings.values()))),
        ("written to", outcome.out),
        ("front", outcome.out and outcome.view.front and outcome.out / "front.svg"),
        ("compress by it", _spell_compress(outcome)),
    ]
    tables = [
        *build_view_tables(outcome.view),
        *map(build_explanation_table, outcome.explanations),
        tabulate_pairs("Done", rows),
    ]
    sizes = [str(found.plan.predicted_bytes) for found in outcome.view.planned]
    return Output(
        tables=tables,
        document={"command": "plan", **outcome.to_dict()},
        lines=[str(path) for path in outcome.paths.values()] or sizes,
    )


def _spell_compress(outcome: PlansOutcome) -> str:
    """Return the command that carries the first plan out, or what keeps it."""
    if not outcome.paths:
        return "-o DIR writes the plans and their scores"
    path = next(iter(outcome.paths.values()))
    return shlex.join(["cptq", "compress", outcome.model.source, "--plan", str(path)])


def present_eval(settings: AnySettings, outcome: EvalOutcome) -> Output:
    """Present the results beside the baseline; for scripts, the first number of each task."""
    summary = outcome.summary
    results = summary.evaluation
    first = {row.task: row for row in reversed(results)}
    tables = [
        build_evaluation_table(summary),
        build_paired_table(summary.paired),
        make_last_table(outcome),
    ]
    return Output(
        tables=tables,
        document=make_document(outcome),
        lines=[repr(first[task].value) for task in dict.fromkeys(row.task for row in results)],
    )


def present_compare(settings: AnySettings, outcome: CompareOutcome) -> Output:
    """Present the size-quality front, the differences, other results and the costs."""
    found = outcome.comparison
    document = found.to_dict()
    for model in document["models"]:
        _remove_samples(model["results"])
    measured = [found.find_quality(model) for model in found.models]
    several = len({(r.task, r.metric) for m in found.models for r in m.results}) > 1
    rest = build_results_table(found) if several else None
    rows = [
        ("notices", format_number(len(found.notices)) if found.notices else "none"),
        ("time", format_seconds(sum(found.timings.values())) if found.timings else None),
        ("written to", outcome.out),
        ("page", outcome.reports.get("html")),
    ]
    return Output(
        tables=[
            *(
                build_front_table(found),
                build_difference_table(found),
                rest,
                build_cost_table(found),
            ),
            tabulate_pairs("Done", rows),
        ],
        document={"command": "compare", **_list_places(outcome), "comparison": document},
        lines=[repr(result.value) if result else "-" for result in measured],
    )


def present_soup(settings: AnySettings, outcome: SoupOutcome) -> Output:
    """Present what was averaged and how much of it is masked."""
    rows = [
        ("models", outcome.models),
        ("tensors", f"{outcome.tensors:,}, {outcome.masked:,} of them masked"),
        ("zeros", f"{outcome.zeros:.1%} of all weights"),
        ("bytes", format_bytes(outcome.weight_bytes)),
        ("written to", outcome.out),
    ]
    document = {
        "command": "soup",
        "out": str(outcome.out),
        "models": outcome.models,
        "tensors": outcome.tensors,
        "masked": outcome.masked,
        "zeros": outcome.zeros,
        "weight_bytes": outcome.weight_bytes,
    }
    return Output(
        tables=[tabulate_pairs("Averaged", rows)], document=document, lines=[str(outcome.out)]
    )


def present_export(settings: AnySettings, outcome: ExportOutcome) -> Output:
    """Present the files that were written, their size and how far the outputs differ."""
    artifact, verified = outcome.artifact, outcome.artifact.manifest["verification"]
    rows = [
        ("format", artifact.format),
        ("weight files", ", ".join(artifact.manifest["weight_files"])),
        (
            "bytes",
            f"{format_bytes(artifact.weight_bytes)} (before: {format_bytes(outcome.bytes_before)})",
        ),
        ("largest difference", _spell_difference(verified and verified["max_abs_difference"])),
        ("written to", artifact.path),
        ("uploaded to", outcome.repository),
    ]
    document = {
        "command": "export",
        "out": str(artifact.path),
        "format": artifact.format,
        "weight_files": artifact.manifest["weight_files"],
        "weight_bytes": artifact.weight_bytes,
        "bytes_before": outcome.bytes_before,
        "verification": verified,
        "repository": outcome.repository,
    }
    lines = [str(artifact.path)]
    return Output(tables=[tabulate_pairs("Exported", rows)], document=document, lines=lines)


def present_bench(settings: AnySettings, outcome: BenchOutcome) -> Output:
    """Present speed, start and memory; for scripts, the decoding (or forward) speed of each."""
    found = outcome.bench
    speed, size = "decode" if found.generates else "forward", found.batch_sizes[0]
    rows = [("time", format_seconds(sum(found.timings.values()))), ("written to", outcome.out)]
    out = None if outcome.out is None else str(outcome.out)
    return Output(
        tables=[*build_bench_tables(found), tabulate_pairs("Done", rows)],
        document={"command": "bench", "out": out, **found.to_dict()},
        lines=[repr(model.find(speed, size)) for model in found.models],
    )


def present_generate(settings: AnySettings, outcome: GenerateOutcome) -> Output:
    """Present the numbers of tokens and their speed; the text itself was printed as it came."""
    document = {"command": "generate", **outcome.to_dict()}
    return Output(tables=(), document=document, lines=(), messages=[outcome.describe()])


def present_verify(settings: AnySettings, found: VerifiedArtifact) -> Output:
    """Present how many files and tensors were compared, and how far the outputs differ."""
    verified = found.reload
    difference = None if verified is None else verified.max_abs_difference
    rows = [
        ("format", found.form),
        ("files", f"{found.files:,} as written"),
        ("tensors", f"{found.tensors:,} as written (sha256)"),
        ("keys", None if verified is None else "none missing, unexpected or mismatched"),
        ("largest difference", _spell_difference(difference)),
    ]
    document = {
        "command": "verify",
        "path": str(found.path),
        "format": found.form,
        "files": found.files,
        "tensors": found.tensors,
        "max_abs_difference": difference,
    }
    table = tabulate_pairs(f"{found.path} is what was written", rows)
    return Output(tables=[table], document=document, lines=[str(found.path)])


def present_inspect(settings: InspectSettings, found: Inspection) -> Output:
    """Present the bytes by part, the layers by how they are stored, what `compress` would do, and
    the provenance."""
    document = {"command": "inspect", **asdict(found), "path": str(found.path)}
    for layer in document["layers"]:
        layer["bits"] = layer["bits"] if isfinite(layer["bits"]) else None
    provenance = (
        tabulate_pairs("Provenance", found.provenance.items()) if found.provenance else None
    )
    layers = _make_layer_table(found.layers) if settings.all_layers else None
    return Output(
        tables=[
            _make_part_table(found),
            _make_kind_table(found.layers),
            *(build_prospect_tables(found.prospect) if found.prospect else []),
            provenance,
            layers,
        ],
        document=document,
        lines=[str(found.nbytes)],
    )


def present_doctor(settings: AnySettings, found: Health) -> Output:
    """Present what is installed and what the machine has; for scripts, what is missing."""
    document = {"command": "doctor", **found.to_dict()}
    lines = [finding.name for finding in found.missing]
    return Output(tables=build_health_tables(found), document=document, lines=lines)


def present_methods(settings: AnySettings, found: MethodsOutcome) -> Output:
    """Present every method in a line; for scripts, the names."""
    document = {"command": "methods", **found.to_dict()}
    names = [method.name for method in found.methods]
    return Output(tables=build_method_tables(found), document=document, lines=names)


PRESENTERS: Mapping[str, Callable[[Any, Any], Output]] = {
    "analyze": present_analyze,
    "plan": present_plan,
    "compress": present_compress,
    "eval": present_eval,
    "compare": present_compare,
    "export": present_export,
    "soup": present_soup,
    "bench": present_bench,
    "generate": present_generate,
    "verify": present_verify,
    "inspect": present_inspect,
    "doctor": present_doctor,
    "methods": present_methods,
}


def make_document(outcome: Reported) -> dict[str, Any]:
    """Return the document of `--format json`."""
    summary = outcome.summary.to_dict()
    _remove_samples([*summary["evaluation"], *summary["baseline"]])
    return {"command": outcome.summary.command, **_list_places(outcome), "summary": summary}


def _remove_samples(results: Iterable[dict[str, Any]]) -> None:
    """Remove the values of single samples: thousands of numbers, which are in the file."""
    for result in results:
        del result["per_sample"]


def _list_places(outcome: Reported | CompareOutcome) -> dict[str, Any]:
    return {name: convert_to_plain(getattr(outcome, name)) for name in ("out", "reports")}


def _spell_difference(difference: float | None) -> str:
    return "not compared" if difference is None else f"{difference:.3g}"


def make_leader_table(tables: Sequence[SensitivityTable]) -> Table:
    """Return the most sensitive unit by each metric, and the time of the run that measured it."""
    leaders = [next((unit for unit, _ in rank_units(table, 1)), "-") for table in tables]
    rows = tuple(
        (table.metric, leader, format_seconds(table.seconds) if table.seconds else "-")
        for table, leader in zip(tables, leaders, strict=True)
    )
    return Table(
        title="Most sensitive by each metric",
        columns=("metric", "unit", "run time"),
        rows=rows,
        right=("run time",),
        note="the report lists more units, with their scores",
    )


def make_block_table(tables: Sequence[SensitivityTable]) -> Table:
    """Return a sparkline for each metric, with one bar per block."""
    rows = []
    for table in tables:
        blocks = sorted(table.per_block)
        bars, logs = draw_sparkline([table.per_block[block] for block in blocks])
        rows.append((table.metric, bars, "log" if logs else ""))
    ends = f" ({blocks[0]} to {blocks[-1]})" if tables and blocks else ""
    note = "log: the bars show the logarithm" if any(row[2] for row in rows) else ""
    return Table(
        title=f"Sensitivity over the blocks{ends}",
        columns=("", "bars", "scale"),
        rows=tuple(rows),
        note=note,
    )


def make_last_table(outcome: Reported) -> Table:
    """Return the reload check, the number of notices, the time and the places written to."""
    summary = outcome.summary
    checked = summary.verification
    return tabulate_pairs(
        "Done",
        [
            ("verified", describe_verification(checked) if checked else None),
            ("notices", count_notices(summary)),
            ("time", format_seconds(sum(summary.timings.values())) if summary.timings else None),
            ("written to", outcome.out),
            ("report", outcome.reports.get("html") or outcome.reports.get("md")),
        ],
    )


def count_notices(summary: Summary) -> str:
    """Return `1 fallback, 2 skipped (the report lists them)`."""
    kinds = group_notices(summary.notices)
    counts = ", ".join(f"{format_number(len(found))} {kind}" for kind, found in kinds.items())
    return f"{counts} (the report lists them)" if counts else "none"


def _make_part_table(found: Inspection) -> Table:
    return Table(
        title=f"{found.path}: {found.form}, {format_bytes(found.nbytes)}, {_count_weights(found)}",
        columns=("part", "tensors", "bytes", "share"),
        rows=tuple(
            (part, f"{count:,}" if count else "", f"{nbytes:,}", f"{nbytes / found.nbytes:.1%}")
            for part, (count, nbytes) in found.parts.items()
        ),
        right=("tensors", "bytes", "share"),
    )


def _count_weights(found: Inspection) -> str:
    if found.weights is None:
        return "weights not counted (the file does not give the shapes of packed layers)"
    return f"{found.weights:,} weights, {found.bits:.2f} bits each"


def _make_kind_table(layers: Sequence[LayerFacts]) -> Table:
    """Return the layers counted by how they are stored."""
    kinds: dict[str, list[LayerFacts]] = {}
    for layer in layers:
        kinds.setdefault(layer.stored, []).append(layer)
    return Table(
        title="Matrices",
        columns=("stored as", "layers", "bytes", "bits"),
        rows=tuple(
            (
                stored,
                str(len(found)),
                f"{sum(x.nbytes for x in found):,}",
                _spell_bits(sum(x.bits for x in found) / len(found)),
            )
            for stored, found in sorted(kinds.items())
        ),
        right=("layers", "bytes", "bits"),
        note="bits: per weight, scales included, averaged over the layers; --all lists them",
    )


def _make_layer_table(layers: Sequence[LayerFacts]) -> Table:
    return Table(
        title="Layers",
        columns=("name", "stored as", "shape", "bits"),
        rows=tuple(
            (x.name, x.stored, " x ".join(map(str, x.shape)), _spell_bits(x.bits)) for x in layers
        ),
        right=("bits",),
    )


def _spell_bits(bits: float) -> str:
    return f"{bits:.3f}" if isfinite(bits) else "?"

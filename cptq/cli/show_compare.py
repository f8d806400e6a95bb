"""What `cptq compare` prints when it is done."""

from __future__ import annotations

from cptq.cli.console import Talk
from cptq.report.comparison import (
    CompareOutcome,
    build_cost_table,
    build_difference_table,
    build_front_table,
    build_results_table,
)
from cptq.report.formatting import format_number, format_seconds, tabulate_pairs
from cptq.report.summary import convert_to_plain


def show_compare(talk: Talk, outcome: CompareOutcome) -> None:
    """Print the comparison as the format asks."""
    found = outcome.comparison
    if talk.shape == "json":
        document = found.to_dict()
        for model in document["models"]:
            for result in model["results"]:
                del result["per_sample"]  # thousands of numbers, which are in the file
        places = {name: convert_to_plain(getattr(outcome, name)) for name in ("out", "reports")}
        talk.document({"command": "compare", **places, "comparison": document})
    elif talk.shape == "quiet":
        for model in found.models:
            result = found.find_quality(model)
            talk.line(repr(result.value) if result else "-")
    else:
        several = len({(r.task, r.metric) for m in found.models for r in m.results}) > 1
        rest = build_results_table(found) if several else None
        talk.tables(
            [build_front_table(found), build_difference_table(found), rest, build_cost_table(found)]
        )
        _end(talk, outcome)


def _end(talk: Talk, outcome: CompareOutcome) -> None:
    found = outcome.comparison
    notices = format_number(len(found.notices)) if found.notices else "none"
    time = format_seconds(sum(found.timings.values())) if found.timings else None
    rows = [("notices", notices), ("time", time), ("written to", outcome.out)]
    talk.table(tabulate_pairs("Done", [*rows, ("page", outcome.reports.get("html"))]))

"""What `cptq compare` prints when it is done."""

from __future__ import annotations

from cptq.cli.console import Talk
from cptq.report.side_by_side import CompareOutcome
from cptq.report.side_tables import cost_table, difference_table, front_table, results_table
from cptq.report.summary import plain
from cptq.report.table import pairs
from cptq.report.words import number, seconds


def show_compare(talk: Talk, outcome: CompareOutcome) -> None:
    """Print the comparison as the format asks."""
    found = outcome.side_by_side
    if talk.shape == "json":
        document = found.to_dict()
        for model in document["models"]:
            for result in model["results"]:
                del result["per_sample"]  # thousands of numbers, which are in the file
        places = {name: plain(getattr(outcome, name)) for name in ("out", "reports")}
        talk.document({"command": "compare", **places, "comparison": document})
    elif talk.shape == "quiet":
        for model in found.models:
            result = found.measured(model)
            talk.line(repr(result.value) if result else "-")
    else:
        several = len({(r.task, r.metric) for m in found.models for r in m.results}) > 1
        rest = results_table(found) if several else None
        talk.tables([front_table(found), difference_table(found), rest, cost_table(found)])
        _end(talk, outcome)


def _end(talk: Talk, outcome: CompareOutcome) -> None:
    found = outcome.side_by_side
    notices = number(len(found.notices)) if found.notices else "none"
    time = seconds(sum(found.timings.values())) if found.timings else None
    rows = [("notices", notices), ("time", time), ("written to", outcome.out)]
    talk.table(pairs("Done", [*rows, ("page", outcome.reports.get("html"))]))

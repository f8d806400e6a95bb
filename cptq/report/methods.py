"""What `cptq methods` shows: a table per kind, a row per name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cptq.registry import Facts
from cptq.report.formatting import Table, tabulate_pairs
from cptq.report.summary import convert_to_plain

#: up to so many names have a table of their own each, with every fact
FEW = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A name, its kind and how it is chosen on the command line."""

    kind: str
    option: str
    name: str
    facts: Facts


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodsOutcome:
    """Return value of `list_methods`."""

    methods: tuple[Method, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"methods": convert_to_plain(self.methods)}


def build_method_tables(found: MethodsOutcome) -> list[Table]:
    """Build a table per kind; of few methods a table each."""
    if len(found.methods) <= FEW:
        return [_build_single_table(method) for method in found.methods]
    kinds = dict.fromkeys(method.kind for method in found.methods)
    return [_build_kind_table([m for m in found.methods if m.kind == kind]) for kind in kinds]


def _build_kind_table(methods: list[Method]) -> Table:
    note = (
        "ranks at: Spearman with the measured damage; plans Nx: divergence of the model against "
        "that of an even plan; docs/metrics.md"
        if methods[0].kind == "metric"
        else ""
    )
    return Table(
        title=f"{methods[0].kind.capitalize()}s ({methods[0].option})",
        columns=("name", "what", "source, cost", "good for, as measured"),
        rows=tuple((m.name, m.facts.does, _join(m.facts), m.facts.good or "-") for m in methods),
        note=note,
    )


def _join(facts: Facts) -> str:
    return "; ".join(part for part in (facts.source, facts.cost) if part) or "-"


def _build_single_table(method: Method) -> Table:
    facts = method.facts
    return tabulate_pairs(
        f"{method.option} {method.name}",
        [
            ("what", facts.does),
            ("source", facts.source),
            ("cost", facts.cost),
            ("good for", facts.good),
        ],
    )

"""The tables of `cptq inspect` on a checkpoint: what `compress` would do with it."""

from __future__ import annotations

from cptq.report.formatting import Table, tabulate_pairs
from cptq.types import Prospect


def build_prospect_tables(found: Prospect) -> list[Table]:
    """Return the parts and what becomes of them, the fused groups, and the runtimes."""
    if found.refusal is not None:
        return [tabulate_pairs("cptq compress refuses it", [("why", found.refusal)])]
    return [
        _build_part_table(found),
        *([_build_group_table(found)] if found.groups else []),
        _build_runtime_table(found),
    ]


def _build_part_table(found: Prospect) -> Table:
    total = max(1, sum(part.nbytes for part in found.parts))
    return Table(
        title=f"What cptq compress will do ({found.kind}; {found.blocks} blocks; family: "
        f"{found.family})",
        columns=("part", "tensors", "bytes now", "share", "what becomes of it"),
        rows=tuple(
            (
                part.what,
                f"{part.tensors:,}",
                f"{part.nbytes:,}",
                f"{part.nbytes / total:.1%}",
                part.fate if part.packed else f"{part.fate} ({part.example})",
            )
            for part in found.parts
        ),
        right=("tensors", "bytes now", "share"),
        note="; ".join(found.notes),
    )


def _build_group_table(found: Prospect) -> Table:
    return Table(
        title="Fused groups, one decision each",
        columns=("group", "roles", "units"),
        rows=tuple((name, roles, f"{count:,}") for name, (roles, count) in found.groups.items()),
        right=("units",),
    )


def _build_runtime_table(found: Prospect) -> Table:
    return Table(
        title="Runtimes that take the result",
        columns=("--runtime", "takes it", "how much, or why not"),
        rows=tuple(
            (name, "yes" if takes else "no", words)
            for name, (takes, words) in found.runtimes.items()
        ),
    )

"""What `cptq doctor` found: what is there, what is missing, and what to type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cptq.report.formatting import Table
from cptq.report.summary import convert_to_plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked for.

    `found` is its version or place; empty where it is missing. `required`: cptq does not work
    without. `remedy`: the command that brings it, or what to do.
    """

    section: str
    name: str
    found: str
    required: bool = False
    remedy: str = ""

    @property
    def state(self) -> str:
        """`ok`, `missing` (cptq does not work), or `absent` (something that is optional)."""
        if self.found:
            return "ok"
        return "missing" if self.required else "absent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Return value of `examine`."""

    findings: tuple[Finding, ...]

    @property
    def missing(self) -> list[Finding]:
        """What was not found, required or not."""
        return [finding for finding in self.findings if not finding.found]

    @property
    def works(self) -> bool:
        """Whether all that is required was found."""
        return not any(finding.required for finding in self.missing)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        rows = [{**convert_to_plain(f), "state": f.state} for f in self.findings]
        return {"works": self.works, "findings": rows}


def build_health_tables(found: Health) -> list[Table]:
    """Build a table per section, and one of what is missing with what to type."""
    sections = dict.fromkeys(finding.section for finding in found.findings)
    tables = [
        _build_section_table(name, [f for f in found.findings if f.section == name])
        for name in sections
    ]
    return [*tables, _build_missing_table(found)]


def _build_section_table(section: str, findings: Sequence[Finding]) -> Table:
    return Table(
        title=section,
        columns=("", "found"),
        rows=tuple((finding.name, finding.found or finding.state) for finding in findings),
    )


def _build_missing_table(found: Health) -> Table:
    verdict = (
        "cptq works; what is absent is optional"
        if found.works
        else "cptq does not work until what is missing is there"
    )
    rows = tuple((f.name, f.state, f.remedy or "-") for f in found.missing)
    return Table(
        title="Missing",
        columns=("what", "state", "what brings it"),
        rows=rows or (("nothing", "", ""),),
        note=verdict,
    )

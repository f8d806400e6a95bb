"""What stands beside a perplexity: how the text was cut, and whether it is in-domain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cptq.types import EvalResult

#: one character, heading and mark of a column: tables of results fill a terminal
IN_DOMAIN = "\u2020"
_MEANING = f"{IN_DOMAIN}: in-domain, calibrated on text of the same corpus, which flatters"


def list_protocols(results: Iterable[EvalResult], tasks: Mapping[str, str]) -> list[str]:
    """List the protocols of each task once; `tasks` are the names to call them by."""
    found = (f"{tasks[row.task]}: {row.protocol}" for row in results if row.protocol)
    return list(dict.fromkeys(found))


def explain_in_domain(results: Iterable[EvalResult]) -> list[str]:
    """Explain the mark, where a result has it."""
    return [_MEANING] if any(row.in_domain for row in results) else []


def spell_in_domain(result: EvalResult | None) -> str:
    """Return the mark of a result that is in-domain."""
    return IN_DOMAIN if result is not None and result.in_domain else ""

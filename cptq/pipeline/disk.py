"""The disk that `cptq compress` and `cptq analyze` take at most, checked before any measurement."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cptq.artifact.atomic import check_space, count_free_bytes
from cptq.pipeline.resume import estimate_bytes
from cptq.pipeline.spilled import bound_analyze, bound_compress
from cptq.report.estimate import DiskFacts

if TYPE_CHECKING:  # they import this module
    from cptq.pipeline.analyze import AnalyzeInputs
    from cptq.pipeline.inputs import CompressInputs


def count_disk(inputs: CompressInputs) -> DiskFacts:
    """Return what a run takes on the disk at most, and what is free."""
    return DiskFacts(
        place=inputs.out,
        output=inputs.need,
        run=estimate_bytes(inputs),
        spilled=bound_compress(inputs),
        free=count_free_bytes(inputs.out),
    )


def check_disk(facts: DiskFacts, *, kept: int = 0) -> None:
    """Refuse a run that the disk has no room for; `kept` bytes of it are there already.

    Raises:
        ArtifactError: says how many bytes are needed, for what, and how many are free.
    """
    run = max(0, facts.run - kept)
    parts = {
        "for the output": facts.output,
        "for finished steps": run,
        "for activations that wait": facts.spilled,
    }
    words = ", ".join(f"{nbytes:,} {use}" for use, nbytes in parts.items() if nbytes)
    more = "make room, name another place with -o, or raise --max-memory"
    hint = more if facts.spilled else None
    check_space(facts.place, sum(parts.values()), parts=words, hint=hint)


def check_analysis(inputs: AnalyzeInputs) -> None:
    """Refuse an analysis whose waiting activations the disk has no room for.

    Raises:
        ArtifactError: says how many bytes are needed, and how many are free.
    """
    place = inputs.place
    spilled = bound_analyze(inputs)
    check_disk(
        DiskFacts(place=place, output=0, run=0, spilled=spilled, free=count_free_bytes(place))
    )

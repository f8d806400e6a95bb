"""`cptq inspect`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cptq.cli import options as o
from cptq.cli.tool import Answer, answer
from cptq.types import Emit

if TYPE_CHECKING:
    from cptq.artifact.inspect import Inspection, LayerFacts
    from cptq.report.formatting import Table

Where = Annotated[
    Path, typer.Argument(metavar="PATH", help="A directory, a .safetensors or a .gguf file.")
]
All = Annotated[bool, typer.Option("--all", help="Every layer, not just how many are alike.")]


def inspect(path: Where, all: All = False, shape: o.Shape = "human") -> None:
    """Show what is in a checkpoint, artifact or GGUF file.

    Only headers are read, whatever the size.
    """

    def work(emit: Emit) -> Answer:
        from cptq.artifact.inspect import inspect as look

        found = look(path)
        document = {"command": "inspect", **asdict(found), "path": str(found.path)}
        for layer in document["layers"]:
            layer["bits"] = layer["bits"] if isfinite(layer["bits"]) else None
        tables = [*_tables(found), *([_every(found.layers)] if all else [])]
        return Answer(tables=tables, document=document, line=str(found.nbytes))

    answer(shape, work)


def _tables(found: Inspection) -> Iterable[Table]:
    from cptq.report.formatting import Table, format_bytes, tabulate_pairs

    yield Table(
        title=f"{found.path}: {found.form}, {format_bytes(found.nbytes)}, {_weights(found)}",
        columns=("part", "tensors", "bytes", "share"),
        rows=tuple(
            (part, f"{count:,}" if count else "", f"{nbytes:,}", f"{nbytes / found.nbytes:.1%}")
            for part, (count, nbytes) in found.parts.items()
        ),
        right=("tensors", "bytes", "share"),
    )
    yield _alike(found.layers)
    if found.provenance:
        yield tabulate_pairs("Provenance", found.provenance.items())


def _weights(found: Inspection) -> str:
    if found.weights is None:
        return "weights not counted (the shapes of packed layers are not told)"
    return f"{found.weights:,} weights, {found.bits:.2f} bits each"


def _alike(layers: tuple[LayerFacts, ...]) -> Table:
    """Layers counted by how they are stored."""
    from cptq.report.formatting import Table

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
                _bits(sum(x.bits for x in found) / len(found)),
            )
            for stored, found in sorted(kinds.items())
        ),
        right=("layers", "bytes", "bits"),
        note="bits: of a weight, scales included, averaged over the layers; --all lists them",
    )


def _every(layers: tuple[LayerFacts, ...]) -> Table:
    from cptq.report.formatting import Table

    return Table(
        title="Layers",
        columns=("name", "stored as", "shape", "bits"),
        rows=tuple(
            (x.name, x.stored, " x ".join(map(str, x.shape)), _bits(x.bits)) for x in layers
        ),
        right=("bits",),
    )


def _bits(bits: float) -> str:
    return f"{bits:.3f}" if isfinite(bits) else "?"

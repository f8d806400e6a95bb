"""`cptq export`. Its --format names the file format, so the shape of the answer is --print."""

from __future__ import annotations

from typing import Annotated

import typer

from cptq.artifact.formats import FORMATS
from cptq.cli import options as o
from cptq.cli.format import Format
from cptq.cli.tool import Answer, answer
from cptq.types import Emit

FileFormat = Annotated[
    str,
    typer.Option("--format", metavar="NAME", help=f"File format: {', '.join(FORMATS)}."),
]
Shape = Annotated[
    Format,
    typer.Option("--print", help="What to print; quiet: just the path.", rich_help_panel=o.OUTPUT),
]


def export(
    artifact: o.Artifact,
    format: FileFormat,
    trust_remote_code: o.TrustRemoteCode = None,
    token: o.Token = None,
    push_to_hub: o.PushToHub = None,
    out: o.OutDir = None,
    overwrite: o.Overwrite = None,
    shape: Shape = "human",
) -> None:
    """Write an artifact in another file format, as it is.

    Nothing is quantized again. Writes to ARTIFACT-FORMAT, or to the directory given by -o.
    """

    def work(emit: Emit) -> Answer:
        from cptq.config import ExportSettings

        settings = ExportSettings(
            artifact=artifact,
            format=FORMATS.check(format),
            out=out,
            overwrite=bool(overwrite),
            push_to_hub=push_to_hub,
            token=token,
            trust_remote_code=bool(trust_remote_code),
        )
        return _exported(settings, emit)

    answer(shape, work)


def _exported(settings: object, emit: Emit) -> Answer:
    from cptq.pipeline import export
    from cptq.report.formatting import format_bytes, tabulate_pairs

    outcome = export(settings, emit)  # type: ignore[arg-type]
    artifact, verified = outcome.artifact, outcome.artifact.manifest["verification"]
    difference = None if verified is None else verified["max_abs_difference"]
    size = format_bytes(artifact.weight_bytes)
    rows = [
        ("format", artifact.format),
        ("weight files", ", ".join(artifact.manifest["weight_files"])),
        ("bytes", f"{size} (before: {format_bytes(outcome.bytes_before)})"),
        ("largest difference", "not compared" if difference is None else f"{difference:.3g}"),
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
    return Answer(
        tables=[tabulate_pairs("Exported", rows)], document=document, line=str(artifact.path)
    )

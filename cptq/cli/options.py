"""The options that commands share, each written once. None means: not given on the line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cptq.cli.format import Format
from cptq.config import DEFAULT_BITS, DEFAULT_GROUP_SIZE, DTYPES, RUNTIMES

RUNNING, TEXT, ACCESS, OUTPUT = "How it runs", "Calibration", "Access", "Output"
_WIDTHS = ",".join(map(str, DEFAULT_BITS))

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A Hub id or a local directory.", show_default=False),
]
Artifact = Annotated[
    Path,
    typer.Argument(metavar="ARTIFACT", help="A directory that cptq wrote.", show_default=False),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="YAML with the same names; options win over it."),
]
Bits = Annotated[
    str | None,
    typer.Option(
        "--bits",
        metavar="LIST",
        help=f"Widths to choose from, 2 to 8 and 16 (dense); default {_WIDTHS}.",
        show_default=False,
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        "--group-size",
        metavar="N",
        help=f"Inputs that share a scale, 0: per output channel; default {DEFAULT_GROUP_SIZE}.",
        show_default=False,
    ),
]
RuntimeName = Annotated[
    str | None,
    typer.Option(
        "--runtime",
        metavar="NAME",
        help=f"What will run it: {', '.join(RUNTIMES)}; only what that loads is planned.",
        show_default=False,
    ),
]
Asymmetric = Annotated[
    bool | None,
    typer.Option(
        "--asymmetric",
        help="Grids with a zero point; needs --runtime cptq or llamacpp.",
        show_default=False,
    ),
]
Sparsity = Annotated[
    str | None,
    typer.Option(
        "--sparsity",
        metavar="LIST",
        help="Offer each width sparse as well: 2:4, 50% or both; needs --runtime cptq. Default "
        "none: at most budgets it buys little.",
        show_default=False,
    ),
]

Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="cpu, cuda, cuda:N, mps; default auto.",
        show_default=False,
        rich_help_panel=RUNNING,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help=f"Type to run in: {', '.join(DTYPES[1:])}; default auto.",
        show_default=False,
        rich_help_panel=RUNNING,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        metavar="N",
        help="Rows in one forward pass; default 8.",
        show_default=False,
        rich_help_panel=RUNNING,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        help="Same seed, same bytes; default 0.",
        show_default=False,
        rich_help_panel=RUNNING,
    ),
]

Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="TEXT",
        help="wikitext, pydoc, glue/TASK, or a .txt, .tsv or .jsonl file; default auto.",
        show_default=False,
        rich_help_panel=TEXT,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        "--samples",
        metavar="N",
        help="Sequences, or sentences for an encoder; default 64.",
        show_default=False,
        rich_help_panel=TEXT,
    ),
]
Seqlen = Annotated[
    int | None,
    typer.Option(
        "--seqlen",
        metavar="N",
        help="Tokens in a sequence; default 512.",
        show_default=False,
        rich_help_panel=TEXT,
    ),
]
EvalSeqlen = Annotated[
    int | None,
    typer.Option(
        "--seqlen",
        metavar="N",
        help="Tokens in a window of perplexity; default 2048, or what the model takes.",
        show_default=False,
        rich_help_panel=RUNNING,
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        help="Data sets in their original layout; default $CPTQ_DATA.",
        show_default=False,
        rich_help_panel=ACCESS,
    ),
]

Revision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="REV",
        help="Branch, tag or commit on the Hub.",
        rich_help_panel=ACCESS,
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token",
        metavar="TOKEN",
        help="Hub token; else $HF_TOKEN or the one you logged in with.",
        rich_help_panel=ACCESS,
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir", metavar="DIR", help="Where downloads are kept.", rich_help_panel=ACCESS
    ),
]
TrustRemoteCode = Annotated[
    bool | None,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model; off by default.",
        show_default=False,
        rich_help_panel=ACCESS,
    ),
]
AllowPickle = Annotated[
    bool | None,
    typer.Option(
        "--allow-pickle",
        help="Read a checkpoint that has no safetensors, weights only.",
        show_default=False,
        rich_help_panel=ACCESS,
    ),
]

Strict = Annotated[
    bool | None,
    typer.Option(
        "--strict",
        help="Refuse to measure an artifact on its own calibration text.",
        show_default=False,
    ),
]
OutDir = Annotated[
    Path | None,
    typer.Option(
        "--out", "--output", "-o", metavar="DIR", help="Directory to write.", rich_help_panel=OUTPUT
    ),
]
OutFile = Annotated[
    Path | None,
    typer.Option(
        "--out", "--output", "-o", metavar="FILE", help="JSON file.", rich_help_panel=OUTPUT
    ),
]
PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="REPO",
        help="Upload the result to this repository, such as your-name/model-4bit.",
        rich_help_panel=OUTPUT,
    ),
]
Overwrite = Annotated[
    bool | None,
    typer.Option(
        "--overwrite",
        help="Replace what is already there.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
Shape = Annotated[
    Format,
    typer.Option(
        "--format",
        help="quiet prints just the path or the number.",
        rich_help_panel=OUTPUT,
    ),
]

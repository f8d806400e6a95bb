"""The options that fix bits by hand, and those that search for plans and prove them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cptq.config import DEFAULT_PAIRS, DEFAULT_TARGETS

HAND, PROOF = "By hand", "Proof"

Pins = Annotated[
    list[str] | None,
    typer.Option(
        "--pin",
        metavar="REGEX=BITS",
        help="Units found get exactly this, as 'down_proj=8bit'; repeatable.",
        rich_help_panel=HAND,
    ),
]
MinBits = Annotated[
    list[str] | None,
    typer.Option(
        "--min-bits",
        metavar="[ROLE=]N",
        help="No unit, or none of a role as down=4, gets fewer; repeatable.",
        rich_help_panel=HAND,
    ),
]
MaxBits = Annotated[
    list[str] | None,
    typer.Option(
        "--max-bits",
        metavar="[ROLE=]N",
        help="No unit, or none of a role, gets more; repeatable.",
        rich_help_panel=HAND,
    ),
]
Refine = Annotated[
    int | None,
    typer.Option(
        "--refine",
        metavar="N",
        help="Try N swaps of bits on the whole model and keep what helps; default 0.",
        show_default=False,
        rich_help_panel=PROOF,
    ),
]
KnownTables = Annotated[
    list[Path] | None,
    typer.Option(
        "--sensitivity",
        metavar="PATH",
        help="An earlier analysis or one of its tables: not measured again; repeatable.",
        rich_help_panel=PROOF,
    ),
]
Validate = Annotated[
    bool | None,
    typer.Option(
        "--validate",
        help="Measure what the scores are worth: ranks and plans against the truth.",
        show_default=False,
        rich_help_panel=PROOF,
    ),
]
Pairs = Annotated[
    int | None,
    typer.Option(
        "--pairs",
        metavar="N",
        help=f"Units and widths whose true damage is measured; default {DEFAULT_PAIRS}.",
        show_default=False,
        rich_help_panel=PROOF,
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="SIZE",
        help=f"Sizes to compare plans at; repeatable; default {', '.join(DEFAULT_TARGETS)}.",
        show_default=False,
        rich_help_panel=PROOF,
    ),
]
Allocators = Annotated[
    list[str] | None,
    typer.Option(
        "--allocator",
        metavar="NAME",
        help="What makes the plans to compare; repeatable; default knapsack.",
        show_default=False,
        rich_help_panel=PROOF,
    ),
]
ValidationCompressor = Annotated[
    str | None,
    typer.Option(
        "--compressor",
        metavar="NAME",
        help="What rounds in the comparison: nearest (fast) or gptq; default nearest.",
        show_default=False,
        rich_help_panel=PROOF,
    ),
]
CheckUniform = Annotated[
    bool | None,
    typer.Option(
        "--check-uniform/--no-check-uniform",
        help="Compress uniformly as well and ship the better; default on.",
        show_default=False,
        rich_help_panel=PROOF,
    ),
]

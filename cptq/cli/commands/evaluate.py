"""`cptq eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from cptq.cli import options as o
from cptq.cli.run import run
from cptq.config import EvalSettings

Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        metavar="NAME",
        help="wikitext, hellaswag, glue/sst2, footprint, text:PATH and others (an unknown name "
        "lists them); repeatable; default wikitext.",
        show_default=False,
    ),
]
LmEval = Annotated[
    str | None,
    typer.Option(
        "--lm-eval",
        metavar="TASKS",
        help="Tasks of lm-evaluation-harness, run by it: names or YAML files, with commas.",
        show_default=False,
    ),
]
Stride = Annotated[
    int | None,
    typer.Option(
        "--stride",
        metavar="N",
        help="Roll windows over the text, each predicting this many tokens.",
        show_default=False,
        rich_help_panel=o.RUNNING,
    ),
]
Baseline = Annotated[
    str | None,
    typer.Option("--baseline", metavar="MODEL", help="A model to measure beside it."),
]
Limit = Annotated[
    float | None,
    typer.Option("--limit", metavar="N", help="Only this many samples; up to 1: this share."),
]


def evaluate(
    ctx: typer.Context,
    model: o.Model = None,
    tasks: Tasks = None,
    lm_eval: LmEval = None,
    baseline: Baseline = None,
    limit: Limit = None,
    strict: o.Strict = None,
    config: o.Config = None,
    seqlen: o.EvalSeqlen = None,
    stride: Stride = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    batch_size: o.BatchSize = None,
    seed: o.Seed = None,
    data_dir: o.DataDir = None,
    revision: o.Revision = None,
    token: o.Token = None,
    cache_dir: o.CacheDir = None,
    trust_remote_code: o.TrustRemoteCode = None,
    allow_pickle: o.AllowPickle = None,
    out: o.OutFile = None,
    overwrite: o.Overwrite = None,
    shape: o.Shape = "human",
) -> None:
    """Measure a model, or an artifact beside its dense model."""
    run("eval", EvalSettings, ctx.params)

"""`cptq compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cptq.cli import limits as lim
from cptq.cli import options as o
from cptq.cli.run import run
from cptq.config import RUNTIMES, CompressSettings

Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        "-t",
        metavar="SIZE",
        help="4bit, 3.5bit, 3.5bpw, 25% or 120MB: never above; default 4bit.",
        show_default=False,
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        "--metric",
        metavar="NAME",
        help="What decides the widths; default output.",
        show_default=False,
    ),
]
Allocator = Annotated[
    str | None,
    typer.Option(
        "--allocator",
        metavar="NAME",
        help="knapsack, cluster, greedy, uniform or even; default knapsack.",
        show_default=False,
    ),
]
Compressor = Annotated[
    str | None,
    typer.Option(
        "--compressor", metavar="NAME", help="gptq or nearest; default gptq.", show_default=False
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
EmbeddingBits = Annotated[
    int | None,
    typer.Option(
        "--embedding-bits",
        metavar="N",
        help="Pack token embeddings and the output head too, at 6, 7 or 8 bits; needs "
        "--runtime cptq.",
        show_default=False,
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", metavar="FILE", help="A plan.json to carry out, in place of --target."),
]
SensitivityFile = Annotated[
    Path | None,
    typer.Option(
        "--sensitivity",
        metavar="FILE",
        help="A sensitivity/METRIC.json of cptq analyze: nothing is measured again.",
    ),
]


def compress(
    ctx: typer.Context,
    model: o.Model = None,
    target: Target = None,
    metric: Metric = None,
    allocator: Allocator = None,
    compressor: Compressor = None,
    runtime: RuntimeName = None,
    plan: PlanFile = None,
    sensitivity: SensitivityFile = None,
    asymmetric: Asymmetric = None,
    embedding_bits: EmbeddingBits = None,
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    pins: lim.Pins = None,
    min_bits: lim.MinBits = None,
    max_bits: lim.MaxBits = None,
    refine: lim.Refine = None,
    check_uniform: lim.CheckUniform = None,
    config: o.Config = None,
    calibration: o.Calibration = None,
    samples: o.Samples = None,
    seqlen: o.Seqlen = None,
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
    push_to_hub: o.PushToHub = None,
    out: o.OutDir = None,
    overwrite: o.Overwrite = None,
    shape: o.Shape = "human",
) -> None:
    """Compress a model to a given size; transformers loads the result.

    Writes to MODEL-cptq-TARGET, or to the directory given by -o.
    """
    run("compress", CompressSettings, ctx.params)

"""`cptq analyze`."""

from __future__ import annotations

from typing import Annotated

import typer

from cptq.cli import limits as lim
from cptq.cli import options as o
from cptq.cli.run import run
from cptq.config import AnalyzeSettings

Metrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        metavar="NAME",
        help="output (default), taylor, pruning, cca, kl ...; repeatable; all: every one but kl.",
        show_default=False,
    ),
]


def analyze(
    ctx: typer.Context,
    model: o.Model = None,
    metrics: Metrics = None,
    runtime: o.RuntimeName = None,
    asymmetric: o.Asymmetric = None,
    sparsity: o.Sparsity = None,
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    sensitivity: lim.KnownTables = None,
    validate: lim.Validate = None,
    pairs: lim.Pairs = None,
    targets: lim.Targets = None,
    allocators: lim.Allocators = None,
    compressor: lim.ValidationCompressor = None,
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
    out: o.OutDir = None,
    overwrite: o.Overwrite = None,
    shape: o.Shape = "human",
) -> None:
    """Measure how sensitive each layer is to compression.

    With --validate, also measures how well each metric's scores predict the true damage. Writes
    the scores and a report to MODEL-analysis, or to the directory given by -o.
    """
    run("analyze", AnalyzeSettings, ctx.params)

"""`cptq compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from cptq.cli import options as o
from cptq.cli.commands.evaluate import Limit, Tasks
from cptq.cli.run import run
from cptq.config import CompareSettings

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL...",
        help="Models, artifacts or eval.json files; the others are held to the first.",
        show_default=False,
    ),
]
NoFootprint = Annotated[
    bool | None,
    typer.Option("--no-footprint", help="Leave out speed and memory.", show_default=False),
]


def compare(
    ctx: typer.Context,
    models: Models = None,
    tasks: Tasks = None,
    limit: Limit = None,
    no_footprint: NoFootprint = None,
    strict: o.Strict = None,
    config: o.Config = None,
    seqlen: o.EvalSeqlen = None,
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
    """Put models side by side: size, quality, speed, memory.

    With -o, writes a page, a drawing of the size-quality front and the numbers.
    """
    params = dict(ctx.params)
    given = params.pop("models") or []
    params |= {"model": given[0] if given else None, "others": tuple(given[1:])}
    run("compare", CompareSettings, params)

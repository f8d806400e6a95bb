"""Artifacts are checked in this process: a new one takes seconds to import torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cptq.artifact import stock_load
from cptq.inference.activations import without_activation_sparsity


def run_here(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """What `reload._run` does, without a new process."""
    (folder / "job.json").write_text(json.dumps(job))
    with without_activation_sparsity():
        stock_load.main(str(folder / "job.json"))
    report: dict[str, Any] = json.loads(Path(job["report"]).read_text())
    return report | {"cptq": []}

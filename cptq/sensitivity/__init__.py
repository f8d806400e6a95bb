"""How much each unit matters: one metric per file, one pass shared by all that are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cptq.registry import Registry

if TYPE_CHECKING:
    from cptq.sensitivity.metric import Metric

METRICS: Registry[type[Metric]] = Registry(
    "metric",
    {
        "output": "cptq.sensitivity.output:Output",
        "output-rtn": "cptq.sensitivity.output:OutputNearest",
        "taylor": "cptq.sensitivity.taylor:Taylor",
        "pruning": "cptq.sensitivity.pruning:Pruning",
        "cca": "cptq.sensitivity.cca:Cca",
        "kl": "cptq.sensitivity.kl:Divergence",
    },
)

"""Sensitivity of each unit to compression: one metric per file, over shared passes."""

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
        "taylor-quantized": "cptq.sensitivity.taylor_quantized:TaylorQuantized",
        "taylor-integrated": "cptq.sensitivity.taylor_integrated:TaylorIntegrated",
        "delta-loss": "cptq.sensitivity.delta_loss:DeltaLoss",
        "perturbation": "cptq.sensitivity.perturbation:Perturbation",
        "linearity": "cptq.sensitivity.linearity:Linearity",
        "pruning": "cptq.sensitivity.pruning:Pruning",
        "cca": "cptq.sensitivity.cca:Cca",
        "cca-svcca": "cptq.sensitivity.cca:CcaSvcca",
        "cca-first": "cptq.sensitivity.cca:CcaFirst",
        "pq-index": "cptq.sensitivity.pq_index:PqIndex",
        "kurtosis": "cptq.sensitivity.kurtosis:Kurtosis",
        "effective-rank": "cptq.sensitivity.effective_rank:EffectiveRank",
        "kl": "cptq.sensitivity.kl:Kl",
    },
)
#: ground truth, at the cost of a forward pass per unit and candidate: measured only when named, not
#: as part of `all`
SLOW = ("kl",)


def list_default_metrics() -> tuple[str, ...]:
    """Return the metrics that `all` stands for: every one but the slow ones."""
    return tuple(name for name in METRICS if name not in SLOW)

"""Sensitivity of each unit to compression: one metric per file, over shared passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cptq.registry import Entry, Facts, Registry

if TYPE_CHECKING:
    from cptq.sensitivity.metric import Metric

METRICS: Registry[type[Metric]] = Registry(
    "metric",
    {
        "output": Entry(
            "cptq.sensitivity.output:Output",
            Facts(
                does="error of the outputs, weighted by the diagonal Fisher information",
                source="QuIP (arXiv 2307.13304)",
                cost="two forward passes and a backward one, a factorization per layer",
                good="default: ranks at 0.86, plans 0.77x (SmolLM2-135M)",
            ),
        ),
        "output-rtn": Entry(
            "cptq.sensitivity.output:OutputNearest",
            Facts(
                does="the same, for rounding to nearest",
                source="NVIDIA Model Optimizer",
                cost="two forward passes and a backward one",
                good="--compressor nearest: ranks at 0.79, plans 0.88x",
            ),
        ),
        "taylor": Entry(
            "cptq.sensitivity.taylor:Taylor",
            Facts(
                does="second order of a Taylor expansion at the dense weights",
                source="CPTQuant's TDMPQ (arXiv 2412.03599)",
                cost="two forward passes and a backward one",
                good="ranks at 0.81, plans 0.86x",
            ),
        ),
        "taylor-quantized": Entry(
            "cptq.sensitivity.taylor_quantized:TaylorQuantized",
            Facts(
                does="Taylor expansion with the gradient of the quantized model",
                source="arXiv 2503.01901",
                cost="a backward pass per width",
                good="study: ranks at 0.62, plans 2.04x, worse than even",
            ),
        ),
        "taylor-integrated": Entry(
            "cptq.sensitivity.taylor_integrated:TaylorIntegrated",
            Facts(
                does="gradient integrated from dense to quantized weights",
                source="PQI (arXiv 2503.01901)",
                cost="backward passes along the path, per width",
                good="study: ranks at 0.60, plans 1.52x, worse than even",
            ),
        ),
        "delta-loss": Entry(
            "cptq.sensitivity.delta_loss:DeltaLoss",
            Facts(
                does="absolute gradients in the quantized model times the changes",
                source="AutoRound (arXiv 2512.04746)",
                cost="a backward pass per width",
                good="study: ranks at 0.56, plans 1.04x",
            ),
        ),
        "perturbation": Entry(
            "cptq.sensitivity.perturbation:Perturbation",
            Facts(
                does="divergence when the inputs of the unit get noise",
                source="CPTQuant's TDMPQ (arXiv 2412.03599)",
                cost="half a forward pass per unit",
                good="ranks at 0.76, plans 0.94x",
            ),
        ),
        "linearity": Entry(
            "cptq.sensitivity.linearity:Linearity",
            Facts(
                does="divergence when the weights of the unit get Gaussian noise",
                source="HIGGS (arXiv 2411.17525)",
                cost="half a forward pass per unit",
                good="sentence encoders: ranks at 0.74 on STS-B, where output ranks at 0.37",
            ),
        ),
        "pruning": Entry(
            "cptq.sensitivity.pruning:Pruning",
            Facts(
                does="divergence when the unit loses its smallest weights",
                source="CPTQuant's PMPQ (arXiv 2412.03599)",
                cost="three half forward passes per unit, eleven whole ones",
                good="essential sparsity; ranks at 0.68, plans 0.93x",
            ),
        ),
        "cca": Entry(
            "cptq.sensitivity.cca:Cca",
            Facts(
                does="correlation of a unit's inputs with its outputs, projection-weighted",
                source="CPTQuant's CMPQ (arXiv 2412.03599)",
                cost="a forward pass, two bases per unit",
                good="the paper's metric: ranks at 0.44, plans 1.03x, no better than even",
            ),
        ),
        "cca-svcca": Entry(
            "cptq.sensitivity.cca:CcaSvcca",
            Facts(
                does="the same with the plain mean of the correlations",
                source="SVCCA (arXiv 1706.05806)",
                cost="as cca",
                good="study: ranks at 0.40, plans 1.02x",
            ),
        ),
        "cca-first": Entry(
            "cptq.sensitivity.cca:CcaFirst",
            Facts(
                does="the same with the first correlation alone",
                source="CMPQ's released code",
                cost="as cca",
                good="study: ranks at 0.19, plans 1.12x",
            ),
        ),
        "pq-index": Entry(
            "cptq.sensitivity.pq_index:PqIndex",
            Facts(
                does="how evenly the magnitudes of the weights are spread",
                source="arXiv 2302.05601",
                cost="one pass over the weights, no text",
                good="study: ranks at 0.45, plans 1.06x",
            ),
        ),
        "kurtosis": Entry(
            "cptq.sensitivity.kurtosis:Kurtosis",
            Facts(
                does="how heavy the tails of the weights are",
                source="arXiv 2002.07686",
                cost="one pass over the weights, no text",
                good="where there is no text: ranks at 0.51, plans 1.05x",
            ),
        ),
        "effective-rank": Entry(
            "cptq.sensitivity.effective_rank:EffectiveRank",
            Facts(
                does="how many directions the weights use",
                source="Roy & Vetterli 2007",
                cost="singular values per layer, no text",
                good="study: ranks at 0.51, plans 1.08x",
            ),
        ),
        "kl": Entry(
            "cptq.sensitivity.kl:Kl",
            Facts(
                does="ground truth: the divergence with that unit alone compressed",
                cost="half a forward pass and a compression per unit and width",
                good="judging other metrics: ranks at 0.94, plans 0.78x, as good as output's",
            ),
        ),
    },
)
#: ground truth, at the cost of a forward pass per unit and candidate: measured only when named, not
#: as part of `all`
SLOW = ("kl",)


def list_default_metrics() -> tuple[str, ...]:
    """Return the metrics that `all` stands for: every one but the slow ones."""
    return tuple(name for name in METRICS if name not in SLOW)

"""`r-sparse`: small inputs are not dropped but multiplied by a low-rank part of the weight.

    y = W (m * x) + B A ((1 - m) * x),      m_j = 1[|x_j| > t],      B A = U_r S_r V_r^T of W

t is the p-quantile of |x|, B = U_r S_r^(1/2) and A = S_r^(1/2) V_r^T in float16.

Source: R-Sparse (Zhang et al., arXiv 2504.19449) and its released code (`R_Sparse_Linear`):
channels above a threshold exactly, the others through the leading singular directions.

Departures: the paper searches the balance of channels and rank per layer by an evolutionary
algorithm, where both take their part of one budget of products; here p is the same everywhere and
the rank a fixed part of the smaller side (1 / `RANK_PART`), because rank costs bytes, which the
target counts. The released code compares |x_j| times a number per input, which comes with the
factors, and by default multiplies a prompt with all inputs; here sizes are compared as they are (a
norm per column is `wina`), and prompts drop inputs too. W is the compressed weight. The
products of the low-rank part are not counted in what is saved: they are 2 / `RANK_PART` of W's, or
less. Cost: a singular value decomposition per linear; 16 bits times rank times (in + out) in the
file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from cptq.activation_sparsity.method import BlockView, Method, Rules
from cptq.layouts.activations import LEFT, RIGHT, THRESHOLD
from cptq.numerics.activation_rules import find_quantile
from cptq.types import ActivationRule, LayerSpec

RANK_PART = 64


def list_rules(layers: Sequence[LayerSpec], _function: str) -> Mapping[str, str]:
    """Return a threshold and factors for every linear."""
    return {spec.name: f"low-rank-{max(1, min(spec.shape) // RANK_PART)}" for spec in layers}


def fit(view: BlockView) -> Rules:
    """Return thresholds and factors."""
    rules = {}
    for name, x_TI in view.inputs.items():
        rank = int(view.labels[name].rpartition("-")[2])
        U_OK, s_K, V_KI = torch.linalg.svd(view.get_weight(name), full_matrices=False)
        root_R = s_K[:rank].sqrt()
        tensors = {
            THRESHOLD: torch.tensor([find_quantile(x_TI.abs(), view.share)]),
            LEFT: (U_OK[:, :rank] * root_R).half(),
            RIGHT: (root_R[:, None] * V_KI[:rank]).half(),
        }
        rules[name] = ActivationRule(label=view.labels[name], tensors=tensors)
    return rules


METHOD = Method(list_rules=list_rules, fit=fit)

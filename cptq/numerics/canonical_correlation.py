"""Compute the canonical correlation of two views of the same tokens, in closed form.

Each view X (tokens, features) is standardised, every feature to mean 0 and variance 1
(`standardize`): language models have features that are a thousand times larger than all others at
one or two tokens ("massive activations", Sun et al., arXiv 2402.17762), which by raw variance would
be all that a view shows. It is then reduced to its principal subspace, the fewest k <= 16
components that hold 99% of its variance, X ~ U S V^T. With ridge e the whitened view is
U diag(s / sqrt(s^2 + e s_1^2)), and the canonical correlations are the singular values

    rho = svdvals(Qx^T Qy),   Qx = Ux diag(sx / sqrt(sx^2 + e sx_1^2)), Qy alike

(Björck & Golub 1973). Three ways to average them into one similarity:

- `svcca`: the plain mean (Raghu et al., arXiv 1706.05806);
- `pwcca`: weighted by how much of the first view each canonical direction carries,
  alpha_i = sum_j |<h_i, x_j>| with h_i the canonical variate in token space (Morcos et al.,
  arXiv 1806.05759, section 3);
- `first`: rho_1 alone, as the released code of CPTQuant does; it saturates near 1.

Departures: the standardised features (SVCCA keeps raw variances); a ridge, relative to the largest
variance, so that directions of very small variance do not count as a perfect match. All in
float64: a Gram matrix squares the condition number.

Sixteen components are enough: against measured damage, 64, 32 and 8 rank units no better (Spearman
on three models, with their exact subspaces), and 64 cost ten times as much. Cost: an
eigendecomposition of the smaller of (tokens, tokens) and (features, features) per view, and a
product. Limits: with fewer tokens than components rho is 1 whatever the data; ten tokens per
component are the minimum (`count_tokens_needed`). Untruncated, a linear layer's input and output
always have rho = 1; truncated, rho measures how far their dominant subspaces agree. Of two
directions of nearly equal variance at the cut-off either may be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from cptq.numerics.reproducible import compute_total, one_thread

Summary = Literal["pwcca", "svcca", "first"]
#: all of them; the first is the default
SUMMARIES: tuple[Summary, ...] = ("pwcca", "svcca", "first")

COMPONENTS = 16
ENERGY = 0.99
RIDGE = 1e-6
#: share of its mean below which the deviation of a feature is rounding
CONSTANT = 1e-6
#: tokens that are compared for each component that is kept, and the fewest
TOKENS_PER_COMPONENT, LEAST_PER_COMPONENT = 32, 10


def count_tokens_needed(features: int, components: int = COMPONENTS) -> int:
    """Return the fewest tokens with which views of this width can be compared."""
    return LEAST_PER_COMPONENT * min(features, components)


def standardize(X_TF: Tensor) -> Tensor:
    """Return the features with mean 0 and variance 1, float64; constant ones are left out.

    Constant up to the rounding of float32, which would count as much as any other feature.
    """
    X_TF = X_TF.double()
    mean_F = X_TF.mean(0)
    X_TF = X_TF - mean_F
    deviation_F = X_TF.square().mean(0).sqrt()
    kept_F = deviation_F > CONSTANT * mean_F.abs()
    return X_TF[:, kept_F] / deviation_F[kept_F]


def compute_principal_basis(
    X_TF: Tensor, *, components: int = COMPONENTS, energy: float = ENERGY, ridge: float = RIDGE
) -> Tensor:
    """Return the ridge-whitened principal directions in token space, Q (tokens, k), float64.

    Args:
        X_TF: features of the tokens; centred here.
        components: most directions kept.
        energy: share of the variance that is enough.
        ridge: share of the largest variance added to every one of them.

    Returns:
        Q with Q^T Q diagonal and at most 1; k = 0 for constant features.
    """
    X_TF = X_TF.double()
    X_TF = X_TF - X_TF.mean(0)
    total = float(compute_total(X_TF.square()))
    values_K, U_TK = _compute_left_singular(X_TF)
    if len(values_K) == 0 or total <= 0.0:
        return U_TK[:, :0]
    enough = int((values_K.cumsum(0) < energy * total * (1 - 1e-12)).sum()) + 1
    kept = min(components, enough)
    shrink_K = (values_K[:kept] / (values_K[:kept] + ridge * values_K[0])).sqrt()
    return U_TK[:, :kept] * shrink_K


def _compute_left_singular(X_TF: Tensor) -> tuple[Tensor, Tensor]:
    """Return squared singular values, largest first, and left vectors; those of 0 are dropped."""
    tokens, features = X_TF.shape
    wide = features > tokens
    gram = X_TF @ X_TF.T if wide else X_TF.T @ X_TF
    with one_thread():
        values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    # without features, as of a constant input, there are no values
    kept = int((values > values[0] * 1e-12).sum()) if len(values) and float(values[0]) > 0 else 0
    values, vectors = values[:kept], vectors[:, :kept]
    return values, vectors if wide else (X_TF @ vectors) / values.sqrt()


def compute_canonical_correlations(Qx_TK: Tensor, Qy_TL: Tensor) -> Tensor:
    """Return rho (min(k, l),), largest first, in [0, 1]."""
    with one_thread():
        rho_K: Tensor = torch.linalg.svdvals(Qx_TK.T @ Qy_TL)
    return rho_K.clamp(0.0, 1.0)


def compute_similarity(
    X_TF: Tensor, Qx_TK: Tensor, Qy_TL: Tensor, *, summary: Summary = "pwcca"
) -> float:
    """Return the similarity of two views, in [0, 1].

    Args:
        X_TF: the first view's features, which weight the directions for `pwcca`.
        Qx_TK: principal basis of the first view.
        Qy_TL: principal basis of the second.
        summary: how the correlations are averaged.

    Returns:
        The similarity; 1 if either view is constant.
    """
    return compute_similarities(X_TF, Qx_TK, Qy_TL)[summary]


def compute_similarities(X_TF: Tensor, Qx_TK: Tensor, Qy_TL: Tensor) -> dict[Summary, float]:
    """Return all summaries of one decomposition; arguments as in `compute_similarity`."""
    if min(Qx_TK.shape[1], Qy_TL.shape[1]) == 0:
        return dict.fromkeys(SUMMARIES, 1.0)
    with one_thread():
        left_KR, rho_R, _ = torch.linalg.svd(Qx_TK.T @ Qy_TL, full_matrices=False)
    return _summarize(compute_loadings(X_TF, Qx_TK), left_KR, rho_R)


def compute_pairwise_similarities(views: Sequence[Tensor]) -> dict[Summary, Tensor]:
    """Return every pair's similarity of views (tokens, features), (views, views), diagonal 1.

    The views are standardised; each one's basis and each pair's decomposition is computed once.
    """
    views = [standardize(X_TF) for X_TF in views]
    bases = [compute_principal_basis(X_TF) for X_TF in views]
    carried = [compute_loadings(X_TF, Q_TK) for X_TF, Q_TK in zip(views, bases, strict=True)]
    shape = len(views), len(views)
    result = {summary: torch.ones(shape, dtype=torch.float64) for summary in SUMMARIES}
    for i, j in combinations(range(len(views)), 2):
        if min(bases[i].shape[1], bases[j].shape[1]) == 0:
            continue
        with one_thread():
            left, rho_R, right = torch.linalg.svd(bases[i].T @ bases[j], full_matrices=False)
        for summary, value in _summarize(carried[i], left, rho_R).items():
            result[summary][i, j] = value
        for summary, value in _summarize(carried[j], right.T, rho_R).items():
            result[summary][j, i] = value
    return result


def compute_loadings(X_TF: Tensor, Q_TK: Tensor) -> Tensor:
    """Return Q^T (X - mean), (k, features): how much of each feature lies in each direction."""
    X_TF = X_TF.double()
    return Q_TK.T @ (X_TF - X_TF.mean(0))


def _summarize(loadings_KF: Tensor, left_KR: Tensor, rho_R: Tensor) -> dict[Summary, float]:
    """Average the correlations rho, whose variates in the first view are Q left."""
    rho_R = rho_R.clamp(0.0, 1.0)
    alpha_R = (left_KR.T @ loadings_KF).abs().sum(1)
    return {
        "pwcca": float((alpha_R * rho_R).sum() / alpha_R.sum()),
        "svcca": float(rho_R.mean()),
        "first": float(rho_R[0]),
    }

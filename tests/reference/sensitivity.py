"""Slow truths of the sensitivity room: loops, float64, autograd, textbook formulas."""

from __future__ import annotations

from itertools import product

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from cptq.calibration.tokens import Calibration
from cptq.checkpoint.loader import load_model
from cptq.checkpoint.model import LoadedModel
from cptq.config import ModelSettings
from cptq.types import CalibrationRecord


def loaded(path: object, *, conv1d: bool = False) -> LoadedModel:
    """A checkpoint on the CPU, its notices dropped."""
    settings = ModelSettings(model=str(path), device="cpu")
    return load_model(settings, lambda event: None, conv1d=conv1d, experts=True)


def random_calibration(
    model: LoadedModel, *, rows: int = 12, length: int = 64, seed: int = 0
) -> Calibration:
    """Random tokens in batches of 4; padded to uneven lengths unless the model is a causal LM."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocab_size
    ids = torch.randint(5, vocabulary, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if model.kind != "causal-lm":
        for index in range(rows):
            mask[index, length - index % 7 * 3 :] = 0
        ids = ids * mask
    batches = [
        {"input_ids": i, "attention_mask": m}
        for i, m in zip(ids.split(4), mask.split(4), strict=True)
    ]
    record = CalibrationRecord(
        source="random",
        origin="random",
        samples=rows,
        seqlen=length,
        tokens=int(mask.sum()),
        seed=seed,
        fingerprint=f"random-{rows}-{length}-{seed}",
        text_sha256="0" * 64,
    )
    return Calibration(batches=batches, record=record)


def kl(p_logits: Tensor, q_logits: Tensor) -> float:
    """KL(p || q) of one row in nats, term by term."""
    p = torch.softmax(p_logits.double(), 0).tolist()
    q = torch.softmax(q_logits.double(), 0).tolist()
    return float(sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True)))


def all_signs(width: int) -> Tensor:
    """Every vector of signs, (2^width, width)."""
    return torch.tensor(list(product((-1.0, 1.0), repeat=width)))


def canonical_correlations(X: Tensor, Y: Tensor) -> np.ndarray:
    """Hotelling's: roots of the generalised eigenproblem of the covariances, largest first."""
    x, y = (np.asarray(v.double() - v.double().mean(0)) for v in (X, Y))
    cross = x.T @ y
    left = cross @ np.linalg.solve(y.T @ y, cross.T)
    roots = scipy.linalg.eigh(left, x.T @ x, eigvals_only=True)
    return np.sqrt(np.clip(roots, 0, 1))[::-1][: min(x.shape[1], y.shape[1])]


def projection_weighted(X: Tensor, Y: Tensor) -> float:
    """PWCCA by its definition: variates h_i from the eigenproblem, alpha_i = sum_j |<h_i, x_j>|."""
    x, y = (np.asarray(v.double() - v.double().mean(0)) for v in (X, Y))
    cross = x.T @ y
    left = cross @ np.linalg.solve(y.T @ y, cross.T)
    roots, directions = scipy.linalg.eigh(left, x.T @ x)
    kept = range(len(roots) - 1, len(roots) - 1 - min(x.shape[1], y.shape[1]), -1)
    total = weight = 0.0
    for i in kept:
        variate = x @ directions[:, i]
        variate = variate / np.linalg.norm(variate)
        alpha = sum(abs(float(variate @ x[:, j])) for j in range(x.shape[1]))
        total += alpha * float(np.sqrt(np.clip(roots[i], 0, 1)))
        weight += alpha
    return total / weight


def per_token_fisher(W: Tensor, x: Tensor, tail: Tensor, d: Tensor) -> Tensor:
    """sum over tokens of the squared gradient by W of d . tanh(W x) tail, a token at a time."""
    total = torch.zeros_like(W)
    for row, direction in zip(x, d, strict=True):
        weight = W.clone().requires_grad_()
        (torch.tanh(weight @ row) @ tail @ direction).backward()
        assert weight.grad is not None
        total += weight.grad**2
    return total


def swept(W: Tensor, H: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Column sweep in the given order on the grid step * Z, re-inverting what is left each time.

    Returns:
        (Q, R): the rounded weights and the rounding error made at each column.
    """
    W, H = W.double().clone(), H.double()
    Q, R = torch.zeros_like(W), torch.zeros_like(W)
    for j in range(W.shape[1]):
        inverse = torch.linalg.inv(H[j:, j:])
        Q[:, j] = (W[:, j] / step).round() * step
        R[:, j] = W[:, j] - Q[:, j]
        W[:, j:] -= torch.outer(R[:, j] / inverse[0, 0], inverse[0])
    return Q, R


def ridge_degrees(H: Tensor, ridge: float) -> list[float]:
    """tr(H_F (H_F + ridge)^-1) over the columns after each one."""
    result = []
    for j in range(H.shape[0]):
        F = H[j + 1 :, j + 1 :].double()
        eye = torch.eye(len(F), dtype=torch.float64)
        result.append(float(torch.trace(F @ torch.linalg.inv(F + ridge * eye))) if len(F) else 0.0)
    return result

"""Measure how far a model's output is from the dense model's, and draw the Fisher's directions.

For each output row (a token, an example, a sentence) with dense output z and changed output z':

- classes (language models, classifiers): z are logits, the distance is KL(p || p'), in nats;
- values (sentence embeddings, regressors): z are numbers, the distance is |z - z'|^2 / 2.

To second order either is 1/2 dz^T A dz with A the Hessian at z' = z: diag(p) - p p^T for classes
(which is also the Fisher information of the logits) and the identity for values. Through the
Jacobian J of z by a layer's weights that becomes 1/2 dW^T F dW with F = J^T A J, the TRUE Fisher,
not the empirical one: it needs no labels, it is the Hessian of the very divergence by which
quantization is judged, and the first-order term is exactly zero (Kunstner et al.,
arXiv 1905.12558).

F is measured with a random direction d per row that has covariance A: back-propagating d gives
gradients g with E[g g^T] = F. Drawing a label from p does that too (d = p - onehot), but where a
model is confident that d is almost always 0 and rarely very large. Instead, with independent
signs e,

    d = sqrt(p) * e - p (sqrt(p) . e),        E[d d^T] = diag(p) - p p^T,

every row counts with about its expected size (Hutchinson's estimator; with two classes |d|^2 is
its mean times 1 +- 2 sqrt(p q), with a label it is 2 p^2 or 2 q^2). Rows are summed, never
averaged, so that each gradient is that of its own output row; signs of different rows are
independent, so that in a causal model the influence of a position on all later tokens adds up in
expectation.

Cost: a few passes over the logits. Limits: the second moment is right, higher ones are not those of
labels; multi-label heads are treated as values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from cptq.numerics.chunks import choose_rows
from cptq.types import ModelKind

Form = Literal["classes", "values"]
#: numbers of an output that the divergence handles at once on a CPU: what a core's cache holds
CHUNK = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """How one kind of model is judged. `row` names what an output row is."""

    kind: ModelKind
    form: Form
    row: str

    @property
    def unit(self) -> str:
        """Return what a divergence is measured in."""
        return ("nats" if self.form == "classes" else "half squared distance") + f" per {self.row}"

    def select_rows(
        self, output: Any, batch: Mapping[str, Tensor], positions: Tensor | None = None
    ) -> Tensor:
        """Return the rows (rows, width) of a model's output that count, in the model's type.

        Language models: logits at the tokens that are not padding, of `positions` where they are
        given; classifiers: logits per example; encoders: the mean-pooled embedding per sentence,
        of length 1.
        """
        if self.kind == "encoder":
            return pool_mean(output.last_hidden_state, mask_real_tokens(batch))
        if self.kind == "classifier":
            return _as_tensor(output.logits)
        logits_BTV, mask_BT = _as_tensor(output.logits), mask_real_tokens(batch)
        if positions is not None:
            if logits_BTV.shape[1] == mask_BT.shape[1]:
                logits_BTV = logits_BTV[:, positions]
            mask_BT = mask_BT[:, positions]
        # picking every row would copy the largest tensor there is
        return logits_BTV.flatten(0, 1) if bool(mask_BT.all()) else logits_BTV[mask_BT]

    def compute_reference(self, z_RV: Tensor) -> Tensor:
        """Return what a divergence is measured from: log-probabilities or values, float32."""
        return z_RV.float().log_softmax(-1) if self.form == "classes" else z_RV.float()

    def compute_divergence(self, reference_RV: Tensor, z_RV: Tensor) -> Tensor:
        """Return the distance of each row (rows,) from the dense one, float64, never negative."""
        rows = choose_rows(z_RV, CHUNK)
        parts = zip(reference_RV.split(rows), z_RV.split(rows), strict=True)
        measure = compute_kl if self.form == "classes" else compute_half_squared_distance
        return torch.cat([measure(dense, other.float()) for dense, other in parts])

    def compute_gradient(self, reference_RV: Tensor, z_RV: Tensor) -> Tensor:
        """Return the gradient of each row's divergence by the changed output, float32.

        q - p for classes, z' - z for values; 0 where the output is the dense model's.
        """
        other_RV = z_RV.detach().float()
        if self.form == "values":
            return other_RV - reference_RV
        return other_RV.softmax(-1).sub_(reference_RV.exp())

    def draw_direction(self, z_RV: Tensor, generator: torch.Generator) -> Tensor:
        """Draw random rows d of the output's shape, float32, with covariance A (see above)."""
        signs_RV = torch.randint(0, 2, z_RV.shape, generator=generator, dtype=torch.int8)
        signs_RV = signs_RV.to(z_RV.device)
        if self.form == "values":
            return signs_RV.float().mul_(2).sub_(1)
        d_RV = torch.empty(z_RV.shape, device=z_RV.device)
        rows = choose_rows(z_RV, CHUNK)
        parts = (x.split(rows) for x in (z_RV.detach(), signs_RV, d_RV))
        for z_PV, signs_PV, d_PV in zip(*parts, strict=True):
            p_PV = z_PV.float().softmax(-1)
            e_PV = signs_PV.float().mul_(2).sub_(1).mul_(p_PV.sqrt())
            torch.sub(e_PV, p_PV.mul_(e_PV.sum(-1, keepdim=True)), out=d_PV)
        return d_RV


def choose_objective(kind: ModelKind, config: PretrainedConfig) -> Objective:
    """Return the objective of a model: classes unless the head gives plain numbers."""
    if kind == "encoder":
        return Objective(kind=kind, form="values", row="sentence")
    if kind != "classifier":
        return Objective(kind=kind, form="classes", row="token")
    plain = config.num_labels == 1 or config.problem_type == "multi_label_classification"
    return Objective(kind=kind, form="values" if plain else "classes", row="example")


def mask_real_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Return a mask (batch, positions), True where a token is not padding."""
    mask_BT = batch.get("attention_mask")
    if mask_BT is None:
        return torch.ones_like(batch["input_ids"], dtype=torch.bool)
    return mask_BT.bool()


def flatten_rows(x: Tensor, mask_BT: Tensor) -> Tensor:
    """Return activations (..., width) as (M, width), one row of text after the other.

    Some families (XLNet) hand on (tokens, rows, width) inside. The shape tells, except where there
    are as many rows as tokens.
    """
    if x.ndim == 3 and x.shape[:2] != mask_BT.shape and x.shape[:2] == mask_BT.T.shape:
        x = x.transpose(0, 1)
    return x.reshape(-1, x.shape[-1])


def select_real_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return activations (rows, tokens, in) as (real tokens, in), padding left out.

    Some families hand on (rows * tokens, in); what has no row per token is kept whole.
    """
    if mask is None:
        return x.reshape(-1, x.shape[-1])
    x_MI = flatten_rows(x, mask)
    if len(x_MI) != mask.numel():
        return x_MI
    return x_MI[mask.flatten().bool()]


def pool_mean(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean over the real tokens, scaled to length 1, (batch, width)."""
    weight_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
    sum_BD = (hidden_BTD * weight_BT1).sum(1)
    return torch.nn.functional.normalize(sum_BD / weight_BT1.sum(1).clamp_min(1.0), dim=-1)


def compute_kl(logp_RV: Tensor, logits_RV: Tensor) -> Tensor:
    """Return KL(p || q) of each row in nats, float64.

    Summed as p (e^d - 1 - d) with d = log q - log p, of which no term is negative: the plain form
    loses a KL of 1e-7 in the rounding of float32.
    """
    d_RV = logits_RV.log_softmax(-1).sub_(logp_RV)
    terms_RV = torch.expm1(d_RV).sub_(d_RV).mul_(logp_RV.exp())
    return terms_RV.sum(-1, dtype=torch.float64).clamp_min(0.0)


def compute_half_squared_distance(dense_RV: Tensor, other_RV: Tensor) -> Tensor:
    """Return |z - z'|^2 / 2 of each row, float64."""
    return (dense_RV - other_RV).double().square().sum(-1) / 2


def _as_tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value

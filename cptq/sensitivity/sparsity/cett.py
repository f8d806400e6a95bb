"""CETT-PPL-p%: how many activations can go before perplexity rises by p percent.

    find the largest CETT e with  PPL(thresholds of e) <= (1 + p / 100) PPL(dense)

where every feed-forward layer drops the inputs of its last linear whose part in the output is below
its own threshold, the one at which its CETT is e on sampled tokens (`cptq.numerics.contributions`).

Source: Luo et al., "Sparsing Law" (arXiv 2411.02335, section 3): one global CETT, found by
bisection, and thresholds by layer. Departures: thresholds come from `TOKENS` calibration tokens,
perplexity from held-out text of the same source; CETT is searched in [0, 1], to 2^-`HALVINGS`.

Cost: `HALVINGS` forward passes of the held-out text per p, and as often thresholds: a product of
 the sampled tokens with the last linears, `contributions.STEPS` times. Limits: causal models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from math import exp
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cptq.calibration.batches import Batch
from cptq.calibration.objective import mask_real_tokens
from cptq.calibration.replay import forward
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight
from cptq.numerics.contributions import Contributions
from cptq.sensitivity.sparsity.lazy_neurons import visit_inputs
from cptq.types import Emit, LayerSpec, Progress

PERCENTS = (1.0, 5.0, 10.0)
#: calibration tokens that thresholds are fitted to
TOKENS = 256
HALVINGS = 7


def measure_cett(
    model: LoadedModel, calibration: Sequence[Batch], held_out: Sequence[Batch], emit: Emit
) -> dict[str, Any]:
    """Return the dense perplexity and, for each p, CETT, perplexity, sparsity and thresholds."""
    samples = _sample_inputs(model, calibration)
    norms = {n: get_weight(model.linear(n)).float().norm(dim=0) for n in samples}
    dense = measure_perplexity(model, held_out, {}, norms)
    found = []
    for done, percent in enumerate(PERCENTS):
        emit(Progress(stage="cett", done=done, total=len(PERCENTS), message=f"p = {percent:g}%"))
        found.append(_search(model, samples, norms, held_out, dense, percent))
    emit(Progress(stage="cett", done=len(PERCENTS), total=len(PERCENTS)))
    return {"perplexity": dense, "tokens": TOKENS, "points": found}


def _sample_inputs(model: LoadedModel, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return the inputs of the last linears at `TOKENS` tokens, evenly from all batches."""
    parts: dict[str, list[Tensor]] = {}
    each = -(-TOKENS // len(batches))

    def visit(spec: LayerSpec, a_TF: Tensor) -> None:
        step = max(1, len(a_TF) // each)
        parts.setdefault(spec.name, []).append(a_TF[::step][:each].float())

    visit_inputs(model, batches, visit)
    return {name: torch.cat(rows)[:TOKENS] for name, rows in parts.items()}


def find_thresholds(
    model: LoadedModel, samples: Mapping[str, Tensor], error: float
) -> dict[str, tuple[float, float]]:
    """Return {linear: (threshold, sparsity on the samples)} at a CETT."""
    found = {}
    for name, a_TF in samples.items():
        layer = Contributions(a_TF, get_weight(model.linear(name)))
        threshold = layer.find_threshold(error)
        found[name] = threshold, layer.measure_sparsity(threshold)
    return found


def _search(
    model: LoadedModel,
    samples: Mapping[str, Tensor],
    norms: Mapping[str, Tensor],
    held_out: Sequence[Batch],
    dense: float,
    percent: float,
) -> dict[str, Any]:
    """Bisect for the largest CETT whose perplexity is within `percent`."""
    low, high = 0.0, 1.0
    kept, reached = find_thresholds(model, samples, 0.0), dense
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        tried = find_thresholds(model, samples, middle)
        got = measure_perplexity(model, held_out, {n: t for n, (t, _) in tried.items()}, norms)
        if got <= dense * (1 + percent / 100):
            low, kept, reached = middle, tried, got
        else:
            high = middle
    shares = [share for _, share in kept.values()]
    return {
        "percent": percent,
        "cett": low,
        "perplexity": reached,
        "sparsity": sum(shares) / len(shares),
        "layers": {n: {"threshold": t, "sparsity": share} for n, (t, share) in kept.items()},
    }


@torch.no_grad()
def measure_perplexity(
    model: LoadedModel,
    batches: Sequence[Batch],
    thresholds: Mapping[str, float],
    norms: Mapping[str, Tensor],
) -> float:
    """Return the perplexity per token while inputs below the thresholds are dropped."""
    total, count = 0.0, 0
    with ExitStack() as stack:
        for name, threshold in thresholds.items():
            hook = _make_hook(threshold, norms[name])
            stack.callback(model.linear(name).register_forward_pre_hook(hook).remove)
        for batch in batches:
            logits_BTV = forward(model, batch).logits[:, :-1].float()
            real = mask_real_tokens(batch)[:, 1:]
            losses = cross_entropy(
                logits_BTV[real], batch["input_ids"][:, 1:][real], reduction="none"
            )
            total += float(losses.double().sum())
            count += int(real.sum())
    return exp(total / max(count, 1))


def _make_hook(threshold: float, norm_F: Tensor) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        a = args[0]
        return (a * (a.abs().float() * norm_F >= threshold), *args[1:])

    return hook

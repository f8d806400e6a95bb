"""Perplexity token by token in float64, as the definition reads."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn


def naive_nll(module: nn.Module, ids: list[int], seqlen: int) -> list[float]:
    """Summed nll in nats of every full window; each token but a window's first is predicted."""
    module = copy.deepcopy(module).double()
    sums = []
    for start in range(0, len(ids) - seqlen + 1, seqlen):
        window = ids[start : start + seqlen]
        with torch.no_grad():
            logits = module(input_ids=torch.tensor([window])).logits[0].tolist()
        sums.append(
            sum(
                math.log(sum(math.exp(x) for x in logits[t - 1])) - logits[t - 1][window[t]]
                for t in range(1, seqlen)
            )
        )
    return sums


def naive_perplexity(module: nn.Module, ids: list[int], seqlen: int) -> float:
    """exp of the mean nll over all predicted tokens of all windows."""
    sums = naive_nll(module, ids, seqlen)
    return math.exp(sum(sums) / (len(sums) * (seqlen - 1)))

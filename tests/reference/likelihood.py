"""Likelihoods of continuations, rolling likelihoods and KL, one row and one token at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import nn


def log_probabilities(module: nn.Module, ids: Sequence[int]) -> list[list[float]]:
    """ln p of every token after each of `ids`, float64."""
    module = copy.deepcopy(module).double()
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([list(ids)])).logits[0].tolist()
    rows = []
    for row in logits:
        top = max(row)
        whole = top + math.log(sum(math.exp(x - top) for x in row))
        rows.append([x - whole for x in row])
    return rows


def naive_score(
    module: nn.Module, context: Sequence[int], continuation: Sequence[int], length: int
) -> tuple[float, bool]:
    """(sum of ln p of the continuation, whether each of its tokens is the likeliest)."""
    whole = [*context, *continuation]
    total, greedy = 0.0, True
    fed = whole[-(length + 1) :][:-1]
    rows = log_probabilities(module, fed)[-len(continuation) :]
    for row, token in zip(rows, continuation, strict=True):
        total += row[token]
        greedy = greedy and row[token] == max(row)
    return total, greedy


def naive_rolling(
    module: nn.Module, ids: Sequence[int], prefix: int, length: int, stride: int
) -> float:
    """Sum of ln p of all `ids`: each from the window that is the first to hold it.

    Windows of at most `length` fed tokens end at length, length + stride, ... and at the end.
    """
    whole = [prefix, *ids]
    ends = [*range(length, len(ids), stride), len(ids)]
    total, done = 0.0, 0
    for end in ends:
        begin = max(0, end - length)
        rows = log_probabilities(module, whole[begin:end])
        for position in range(done, end):
            total += rows[position - begin][whole[position + 1]]
        done = end
    return total


def naive_kl(base: nn.Module, module: nn.Module, ids: Sequence[int]) -> list[float]:
    """KL(base || module) in nats after each token but the last."""
    pairs = zip(log_probabilities(base, ids), log_probabilities(module, ids), strict=True)
    found = [sum(math.exp(p) * (p - q) for p, q in zip(ps, qs, strict=True)) for ps, qs in pairs]
    return found[:-1]

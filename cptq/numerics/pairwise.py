"""Sums of matrices whose bits do not depend on who summed which part.

Floating-point addition is not associative: two processes that sum half of a text each get other
bits than one that sums all of it. So a text has a fixed number of parts, a power of two, each
summed from 0, and the sums are added in one tree, whoever holds them: part p is first added to part
p + half, then those that are a quarter apart, and so on. A process of index r among n takes the
parts r, r + n, r + 2 n, ...: they are a whole subtree for every n that divides the number of parts.

    order_parts(8, 0, 1)     0, 4, 2, 6, 1, 5, 3, 7: neighbours are added first
    PairwiseSum              adds what comes in that order, as soon as it has two sums of a level
    add_in_pairs(sums_RN)    the rest of the tree, over what the processes have

Memory: of eight parts at most three sums wait while another one grows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


def order_parts(parts: int, index: int = 0, count: int = 1) -> list[int]:
    """Return the parts of process `index` of `count` in the order in which they are added."""
    return [index + count * place for place in _reverse_bits(parts // count)]


def _reverse_bits(size: int) -> list[int]:
    """Return 0 .. size - 1, a power of two, such that neighbours are half of it apart."""
    if size == 1:
        return [0]
    half = [2 * place for place in _reverse_bits(size // 2)]
    return half + [place + 1 for place in half]


def add_in_pairs(sums_RN: Tensor) -> Tensor:
    """Return the sum (N,) of the rows of all processes (R, N), R a power of two."""
    while len(sums_RN) > 1:
        half = len(sums_RN) // 2
        sums_RN = sums_RN[:half] + sums_RN[half:]
    return sums_RN[0]


class Waiting(Protocol):
    """A sum that waits for its neighbour, in memory or on the disk."""

    def get(self) -> Tensor:
        """Return it; it may be changed, as nothing asks twice."""


class PairwiseSum:
    """The sum of parts that come in the order of `order_parts`; None is a part that is empty.

    `keep` keeps sums that wait.
    """

    def __init__(self, keep: Callable[[Tensor], Waiting]) -> None:
        self._keep = keep
        self._waiting: list[tuple[int, Waiting | None]] = []

    def push(self, part: Tensor | None) -> None:
        """Add the sum of a part, whose memory is taken over."""
        level = 0
        while self._waiting and self._waiting[-1][0] == level:
            _, earlier = self._waiting.pop()
            part = add_where_known(None if earlier is None else earlier.get(), part)
            level += 1
        self._waiting.append((level, None if part is None else self._keep(part)))

    def take(self) -> Tensor | None:
        """Return the sum of all parts, of which a power of two has come; None if all are empty."""
        ((_, total),) = self._waiting
        self._waiting = []
        return None if total is None else total.get()


def add_where_known(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Return the sum in the memory of `one`; the other where one of them is None."""
    if one is None or other is None:
        return other if one is None else one
    return one.add_(other)


class MatrixSum:
    """A sum (in, in) of products of rows, and how many rows (`tokens`) went in.

    It takes memory from the first rows on. `take` hands it over part by part, `put` takes the sum
    of the parts back.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self._features, self._device = features, device
        self._sum_II: Tensor | None = None
        self.tokens = 0

    def open(self) -> Tensor:
        """Return the sum itself, for more to be added to; zeros before the first rows."""
        if self._sum_II is None:
            self._sum_II = torch.zeros(self._features, self._features, device=self._device)
        return self._sum_II

    def take(self) -> Tensor | None:
        """Hand over the sum since the last call, None without any rows; `tokens` counts on."""
        sum_II, self._sum_II = self._sum_II, None
        return sum_II

    def put(self, sum_II: Tensor | None, tokens: int) -> None:
        """Go on from a sum over that many rows."""
        self._sum_II, self.tokens = sum_II, tokens

    def _divide(self) -> Tensor:
        """Return the mean over the rows in the memory of the sum, which begins anew."""
        mean_II = self.open().div_(max(self.tokens, 1))
        self._sum_II = None
        return mean_II

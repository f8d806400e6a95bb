"""Allocation: from scores and a budget to one candidate per unit. Free of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cptq.registry import Registry

if TYPE_CHECKING:
    from cptq.allocation.problem import Allocator

ALLOCATORS: Registry[Allocator] = Registry(
    "allocator",
    {
        "knapsack": "cptq.allocation.knapsack:solve_knapsack",
        "cluster": "cptq.allocation.cluster:solve_by_clusters",
        "greedy": "cptq.allocation.greedy:solve_greedily",
        "uniform": "cptq.allocation.uniform:solve_uniform",
        "even": "cptq.allocation.even:solve_even",
    },
)
#: allocators that need no scores, and so no measurement
BLIND = ("uniform", "even")

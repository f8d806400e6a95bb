"""From scores and a budget to one choice per unit. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cptq.registry import Registry

if TYPE_CHECKING:
    from cptq.allocation.problem import Allocator

ALLOCATORS: Registry[Allocator] = Registry(
    "allocator",
    {
        "knapsack": "cptq.allocation.knapsack:knapsack",
        "cluster": "cptq.allocation.cluster:cluster",
        "greedy": "cptq.allocation.greedy:greedy",
        "uniform": "cptq.allocation.uniform:uniform",
        "even": "cptq.allocation.even:even",
    },
)
#: allocators that look at no score, and so need no measurement
BLIND = ("uniform", "even")

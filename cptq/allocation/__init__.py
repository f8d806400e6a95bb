"""Allocation: from scores and a budget to one candidate per unit. Free of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cptq.registry import Entry, Facts, Registry

if TYPE_CHECKING:
    from cptq.allocation.problem import Allocator

ALLOCATORS: Registry[Allocator] = Registry(
    "allocator",
    {
        "knapsack": Entry(
            "cptq.allocation.knapsack:solve_knapsack",
            Facts(
                does="least sum of scores within the budget, exactly",
                source="Pisinger 1995 (EJOR 83)",
                cost="milliseconds to seconds",
                good="default: KL 0.72x to 0.83x of even at 2.5 to 4 bits",
            ),
        ),
        "cluster": Entry(
            "cptq.allocation.cluster:solve_by_clusters",
            Facts(
                does="KMeans(3) on the scores, most bits to the most sensitive group",
                source="CPTQuant (arXiv 2412.03599)",
                cost="milliseconds",
                good="the paper's way; its algorithm on whole blocks diverges 3x as far and more",
            ),
        ),
        "greedy": Entry(
            "cptq.allocation.greedy:solve_greedily",
            Facts(
                does="the best step per byte first, until nothing fits",
                cost="milliseconds",
                good="within one step of the relaxed optimum; a check of knapsack",
            ),
        ),
        "uniform": Entry(
            "cptq.allocation.uniform:solve_uniform",
            Facts(
                does="the largest single width that fits everywhere",
                cost="needs no scores",
                good="comparison with other tools",
            ),
        ),
        "even": Entry(
            "cptq.allocation.even:solve_even",
            Facts(
                does="uniform, what is left spread evenly over depth",
                cost="needs no scores",
                good="the baseline that --check-uniform compares with",
            ),
        ),
    },
)
#: allocators that need no scores, and so no measurement
BLIND = ("uniform", "even")
#: allocators whose plan no other within the budget beats by its summed score
EXACT = ("knapsack",)

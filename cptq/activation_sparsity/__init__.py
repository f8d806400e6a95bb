"""Which inputs of a linear need not be multiplied: rules fitted without training, one file each.

A method says first, from shapes alone, which linears get which rule, so that bytes can be counted;
then it fits the rules of one block after the other (`walk`). What a rule does at run time is in
`cptq.numerics.activation_rules`, how it is stored in `cptq.layouts.activations`.
"""

from __future__ import annotations

from cptq.activation_sparsity.method import Method
from cptq.registry import Entry, Facts, Registry

__all__ = ["METHODS", "Method"]

#: --activation-sparsity
METHODS: Registry[Method] = Registry(
    "activation sparsity",
    {
        "exact": Entry(
            "cptq.activation_sparsity.exact:METHOD",
            Facts(
                does="mark and count the zeros that ReLU leaves; the same result",
                source="arXiv 2210.06313",
                good="models with ReLU",
            ),
        ),
        "teal": Entry(
            "cptq.activation_sparsity.teal:METHOD",
            Facts(
                does="drop small inputs; shares split greedily within a block",
                source="arXiv 2408.14690",
                cost="about a hundred runs of each block on 256 tokens",
                good="one number per linear in the file",
            ),
        ),
        "wina": Entry(
            "cptq.activation_sparsity.wina:METHOD",
            Facts(
                does="drop inputs small by size times the norm of their column",
                source="arXiv 2505.19427",
                cost="a threshold per input in the file",
                good="a little less loss than teal (stories260k)",
            ),
        ),
        "statistical-top-k": Entry(
            "cptq.activation_sparsity.statistical_top_k:METHOD",
            Facts(
                does="drop inputs below mean plus deviations of the token's own",
                source="arXiv 2506.06644",
                good="least loss at 65% (stories260k)",
            ),
        ),
        "chess": Entry(
            "cptq.activation_sparsity.chess:METHOD",
            Facts(
                does="thresholds per channel of the gate; of attention q and o alone",
                source="arXiv 2409.01366",
                cost="a threshold per gate output in the file",
                good="gated layers; most loss per product saved (stories260k)",
            ),
        ),
        "r-sparse": Entry(
            "cptq.activation_sparsity.r_sparse:METHOD",
            Facts(
                does="drop small inputs, which a low-rank product stands for",
                source="arXiv 2504.19449",
                cost="low-rank factors in the file, within the target",
                good="least loss at 25% to 50%, close to wina (stories260k)",
            ),
        ),
    },
)

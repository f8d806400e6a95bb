"""How many numbers go through a chain of operations at once.

On a CPU the chain is fastest while its numbers stay in a cache. A GPU needs some microseconds to
start an operation, whatever its size, and has no use for small parts: 4,096 logits over 128,000
tokens are 2,000 parts of a CPU's cache, and ten operations on each take 0.1 s to start, where the
memory could be read ten times in 7 ms. So a part there is as large as its copies may be.
"""

from __future__ import annotations

from torch import Tensor

#: numbers in a part on a GPU: 128 MiB of float32, of which a chain holds up to six copies
ON_DEVICE = 1 << 25


def choose_chunk(x: Tensor, cached: int) -> int:
    """Return how many numbers of a tensor to handle at once: `cached` on a CPU, more on a GPU."""
    return cached if x.device.type == "cpu" else max(cached, ON_DEVICE)


def choose_rows(X: Tensor, cached: int) -> int:
    """Return how many rows of a matrix (rows, width) have so many numbers; at least one."""
    return max(1, choose_chunk(X, cached) // X.shape[-1])

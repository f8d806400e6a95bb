"""Which group size a layer really gets.

A group must divide `in_features` (stock loaders refuse ragged groups). Where the asked one does
not, the largest divisor in [asked / 2, asked] is taken, so that neither the scales' bytes nor the
error can more than double; where there is none, one scale per output channel.
"""

from __future__ import annotations


def resolve_group(in_features: int, group_size: int) -> int:
    """The group size used for a layer: a divisor of `in_features`.

    Args:
        in_features: inputs of the layer.
        group_size: the size asked for; 0 asks for one group per channel.

    Returns:
        A divisor of `in_features`; `in_features` itself means per channel.
    """
    if group_size <= 0 or group_size >= in_features:
        return in_features
    for size in range(group_size, (group_size + 1) // 2 - 1, -1):
        if in_features % size == 0:
            return size
    return in_features

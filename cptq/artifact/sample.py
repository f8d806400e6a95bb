"""The sample in a manifest: a short input and some of its outputs, for checking a copy.

All logits of 64 tokens are tens of megabytes, so `KEPT_OUTPUTS` evenly spread ones and the largest
are kept. Any change of the weights changes all outputs, including these.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, prod
from typing import Any

import torch

from cptq.artifact.reload import ReloadSample
from cptq.errors import ArtifactError

KEPT_OUTPUTS = 256
#: upper bound on the number of outputs, so that a hostile manifest cannot exhaust memory
MOST_OUTPUTS = 1 << 28


def record_sample(sample: ReloadSample) -> dict[str, Any]:
    """Return the sample as plain data, deterministically."""
    flat = sample.expected.detach().float().cpu().reshape(-1)
    return {
        "inputs": {name: x.tolist() for name, x in sample.inputs.items()},
        "shape": list(sample.expected.shape),
        "largest": int(flat.abs().argmax()),
        "values": flat[_pick_positions(flat.numel(), int(flat.abs().argmax()))].tolist(),
        "tolerance": sample.tolerance,
        "attention": sample.attention,
    }


def _pick_positions(numel: int, largest: int) -> torch.Tensor:
    """Return the positions of the outputs to keep, in order."""
    count = min(KEPT_OUTPUTS, numel)
    spread = [i * numel // count for i in range(count)]
    return torch.tensor(sorted({*spread, largest}), dtype=torch.int64)


def read_sample(record: Any, *, trust_remote_code: bool = False) -> ReloadSample:
    """Read the sample back; outputs that were not kept are NaN, and it is marked partial.

    Raises:
        ArtifactError: the record is invalid.
    """
    try:
        shape = tuple(int(n) for n in record["shape"])
        numel, largest = prod(shape), int(record["largest"])
        if not shape or min(shape) < 1 or numel > MOST_OUTPUTS or not 0 <= largest < numel:
            raise ValueError(f"outputs of shape {shape}")
        return _build_sample(record, shape, _pick_positions(numel, largest), trust_remote_code)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError) as error:
        raise ArtifactError(f"the manifest's sample cannot be read: {error}") from error


def _build_sample(
    record: Mapping[str, Any],
    shape: tuple[int, ...],
    positions: torch.Tensor,
    trust_remote_code: bool,
) -> ReloadSample:
    values = torch.tensor(record["values"], dtype=torch.float32)
    tolerance = float(record["tolerance"])
    if values.shape != positions.shape or not bool(torch.isfinite(values).all()):
        raise ValueError(f"{values.numel()} outputs, {len(positions)} expected")
    if not isfinite(tolerance) or tolerance <= 0:
        raise ValueError(f"a tolerance of {tolerance}")
    expected = torch.full((prod(shape),), torch.nan)
    expected[positions] = values
    return ReloadSample(
        inputs={str(n): torch.tensor(x, dtype=torch.int64) for n, x in record["inputs"].items()},
        expected=expected.view(shape),
        tolerance=tolerance,
        attention=record["attention"],
        trust_remote_code=trust_remote_code,
        partial=True,
    )

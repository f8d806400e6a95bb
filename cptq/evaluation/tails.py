"""A quantile over the tokens of a text, with the standard error that its windows give.

Tokens of one window are alike, so that windows are the independent samples, as for every mean here.
A quantile is no mean; Woodruff's way (1952, "Confidence intervals for medians and other position
measures") makes one of it. Let q be the sample's quantile at the level p. The share of tokens up to
q is a ratio of sums over windows, whose standard error s is that of `cptq.evaluation.perplexity`;
carried back through the sample's own quantiles it is one of q:

    stderr(q) = ( Q(p + s) - Q(p - s) ) / 2

No resampling, no density to estimate. Where p + s goes past 1 the windows are too few to tell how
heavy the tail is, and there is no error (None) rather than one that is too small. A maximum would
have none at all: it grows with the number of tokens, and tells of one of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cptq.evaluation.perplexity import Estimate, ratio

Numbers = np.ndarray[Any, Any]


def quantile(values_NT: Numbers, level: float) -> Estimate:
    """The quantile of all values, N windows of T tokens; `stderr` is None where N is too small."""
    found = float(np.quantile(values_NT, level))
    windows, tokens = values_NT.shape
    below = ratio((values_NT <= found).sum(1), np.full(windows, tokens))
    if below.stderr is None or level + below.stderr > 1:
        return Estimate(value=found, stderr=None)
    low, high = np.quantile(values_NT, [max(level - below.stderr, 0.0), level + below.stderr])
    return Estimate(value=found, stderr=float(high - low) / 2)

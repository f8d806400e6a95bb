"""Log-sum-exp and divergence of logits over a wide vocabulary.

With z the logits of a position and m their largest, the normaliser of its distribution is

    lse(z) = m + ln sum_v exp(z_v - m)

and with p of the logits a, q of the logits b,

    KL(p || q) = sum_v p_v ((a_v - b_v) - (lse(a) - lse(b)))

The difference is taken before it is weighed, so that equal logits give exactly 0, and small
divergences do not drown in the normalisers. Logits are float32, sums over them float64.

Cost: every operation is a pass over the logits, which memory limits; so a few positions at a time
go through all of them while a cache holds them (`CACHED`). For 262,144 tokens and a width of 640
this takes a quarter of the time of the product that makes the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cptq.numerics.chunks import choose_rows

#: logits that go through all operations at once on a CPU
CACHED = 1 << 19
#: logits of which `find_likeliest` takes the largest first
RUN = 512


def compute_logsumexp(logits_TV: Tensor) -> Tensor:
    """Return ln sum_v exp(z_v) of float32 logits (positions, vocabulary): float64 (positions,)."""
    return torch.cat([_compute_logsumexp(part) for part in _split(logits_TV)])


def _compute_logsumexp(logits_TV: Tensor) -> Tensor:
    top_T = logits_TV.amax(-1)
    sum_T = (logits_TV - top_T.unsqueeze(-1)).exp_().sum(-1, dtype=torch.float64)
    return sum_T.log() + top_T


def compare_logits(
    base_TV: Tensor, own_TV: Tensor, base_lse_T: Tensor, own_lse_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compare two distributions at each position.

    Args:
        base_TV: logits of the reference, float32 (positions, vocabulary).
        own_TV: logits of the other.
        base_lse_T: `compute_logsumexp` of the reference.
        own_lse_T: of the other.

    Returns:
        KL(reference || other) in nats, float64; the likeliest token of each, int64.
    """
    lengths = [len(part) for part in _split(base_TV)]
    logits, normalisers = (base_TV, own_TV), (base_lse_T, own_lse_T)
    parts = [*map(_split, logits), *(lse_T.split(lengths) for lse_T in normalisers)]
    kl, base, own = zip(*map(_compare, *parts), strict=True)
    return torch.cat(kl), torch.cat(base), torch.cat(own)


def _compare(
    a_TV: Tensor, b_TV: Tensor, a_lse_T: Tensor, b_lse_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    p_TV = (a_TV - a_lse_T.float().unsqueeze(-1)).exp_()
    gap_TV = (a_TV - b_TV).sub_((a_lse_T - b_lse_T).float().unsqueeze(-1))
    kl_T = gap_TV.mul_(p_TV).sum(-1, dtype=torch.float64).clamp_(min=0)
    return kl_T, find_likeliest(a_TV), find_likeliest(b_TV)


def find_likeliest(logits_TV: Tensor) -> Tensor:
    """Return the first index of the largest value of each row, as `argmax(-1)` does: int64.

    torch's `argmax` takes 2.6 ns a value on a CPU, `amax` 0.2: so runs of `RUN` values are reduced
    to their largest, and only the first run that holds the largest of all is searched.
    """
    width = logits_TV.shape[-1]
    whole = width - width % RUN
    tops = [logits_TV[:, :whole].unflatten(-1, (-1, RUN)).amax(-1)] if whole else []
    if whole < width:
        tops.append(logits_TV[:, whole:].amax(-1, keepdim=True))
    start_T1 = torch.cat(tops, dim=-1).argmax(-1, keepdim=True) * RUN
    # beyond the end the last value is repeated, which is never the first of its kind
    place_TR = (start_T1 + torch.arange(RUN, device=logits_TV.device)).clamp_(max=width - 1)
    return start_T1.squeeze(-1) + logits_TV.gather(-1, place_TR).argmax(-1)


def _split(logits_TV: Tensor) -> list[Tensor]:
    return list(torch.split(logits_TV, choose_rows(logits_TV, CACHED)))

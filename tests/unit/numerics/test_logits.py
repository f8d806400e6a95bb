"""Log-sum-exp and divergence of logits against their definitions in float64, on odd sizes."""

from __future__ import annotations

import pytest
import torch

from cptq.numerics import logits
from cptq.numerics.logits import RUN, compare_logits, compute_logsumexp, find_likeliest


@pytest.mark.parametrize(("positions", "vocabulary"), [(1, 1), (3, 7), (11, 301)])
@pytest.mark.parametrize("cached", [1, 700, 1 << 19])
def test_they_are_what_they_are_defined_as(
    positions: int, vocabulary: int, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logits, "CACHED", cached)
    draw = torch.Generator().manual_seed(positions)
    a_TV = 9 * torch.randn(positions, vocabulary, generator=draw) + 40
    b_TV = a_TV + 0.1 * torch.randn(positions, vocabulary, generator=draw)
    p, q = a_TV.double().softmax(-1), b_TV.double().softmax(-1)
    lse_T = compute_logsumexp(b_TV)
    torch.testing.assert_close(lse_T, b_TV.double().exp().sum(-1).log(), rtol=1e-7, atol=0)
    kl_T, base_T, own_T = compare_logits(a_TV, b_TV, compute_logsumexp(a_TV), lse_T)
    expected = (p * (p.log() - q.log())).sum(-1)
    torch.testing.assert_close(kl_T, expected, rtol=1e-4, atol=1e-7)
    assert base_T.tolist() == a_TV.argmax(-1).tolist()
    assert own_T.tolist() == b_TV.argmax(-1).tolist()


def test_equal_logits_have_no_divergence_and_large_ones_do_not_overflow() -> None:
    z_TV = torch.tensor([[1e4, -1e4, 1e4], [0.1, 0.2, 0.3]])
    lse_T = compute_logsumexp(z_TV)
    kl_T, _, _ = compare_logits(z_TV, z_TV.clone(), lse_T, lse_T)
    assert kl_T.tolist() == [0.0, 0.0]
    assert float(compute_logsumexp(z_TV)[0]) == pytest.approx(1e4 + 0.6931, rel=1e-6)


@pytest.mark.parametrize("width", [1, 7, RUN - 1, RUN, RUN + 1, 3 * RUN, 5 * RUN + 13])
def test_the_likeliest_is_the_first_of_the_largest(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    logits = torch.randint(-4, 5, (6, width), generator=generator).float()  # many are equal
    logits[0] = -torch.inf
    logits[1, -1] = 9.0
    logits[2, width // 2] = torch.nan
    assert torch.equal(find_likeliest(logits), logits.argmax(-1))

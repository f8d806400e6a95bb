"""Answers, divergences and directions against loops and autograd."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import PretrainedConfig

from cptq.calibration import objective
from cptq.calibration.objective import Objective, choose_objective, mask_real_tokens, pool_mean
from tests.reference import sensitivity as truth

LM = Objective(kind="causal-lm", form="classes", row="token")
ENCODER = Objective(kind="encoder", form="values", row="sentence")


@pytest.mark.parametrize("width", [1, 2, 7, 513])
def test_kl_equals_the_sum_of_its_terms(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "CHUNK", 700)  # 700, 350, 100 rows at once, and 1
    draw = torch.Generator().manual_seed(width)
    dense = 3 * torch.randn(301, width, generator=draw)
    other = dense + torch.randn(301, width, generator=draw)
    ours = LM.compute_divergence(LM.compute_reference(dense), other)
    expected = [truth.kl(p, q) for p, q in zip(dense, other, strict=True)]
    torch.testing.assert_close(
        ours, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-9
    )


def test_a_tiny_kl_survives_float32() -> None:
    draw = torch.Generator().manual_seed(0)
    dense = torch.randn(20, 5000, generator=draw)
    other = dense + 1e-3 * torch.randn(20, 5000, generator=draw)
    ours = float(LM.compute_divergence(LM.compute_reference(dense), other).mean())
    expected = sum(truth.kl(p, q) for p, q in zip(dense, other, strict=True)) / 20
    assert expected < 1e-6
    assert ours == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("model", [LM, ENCODER], ids=["classes", "values"])
@pytest.mark.parametrize("width", [1, 2, 37])
def test_the_slope_is_the_gradient_of_the_divergence(model: Objective, width: int) -> None:
    draw = torch.Generator().manual_seed(width)
    dense, other = (torch.randn(5, width, generator=draw) for _ in range(2))
    z = other.double().requires_grad_()
    if model.form == "values":
        ((z - dense.double()) ** 2 / 2).sum().backward()
    else:
        p = dense.double().softmax(-1)
        (p * (p.log() - z.log_softmax(-1))).sum().backward()
    assert z.grad is not None
    slope = model.compute_gradient(model.compute_reference(dense), other)
    torch.testing.assert_close(slope, z.grad.float(), atol=1e-6, rtol=1e-5)
    assert float(model.compute_gradient(model.compute_reference(dense), dense).abs().max()) < 1e-6


def test_the_distance_of_an_answer_to_itself_is_exactly_zero() -> None:
    z = torch.randn(9, 33)
    assert float(LM.compute_divergence(LM.compute_reference(z), z).abs().max()) == 0.0
    assert float(ENCODER.compute_divergence(ENCODER.compute_reference(z), z).abs().max()) == 0.0


def test_directions_have_the_covariance_of_the_fisher() -> None:
    """Exactly: the mean over all sign vectors is diag(p) - p p^T."""
    z = torch.tensor([0.3, -1.0, 2.0, 0.0])
    p = z.softmax(0)
    signs = truth.all_signs(4)
    e = signs * p.sqrt()
    d = e - p * e.sum(1, keepdim=True)
    expected = torch.diag(p) - torch.outer(p, p)
    torch.testing.assert_close(d.T @ d / len(d), expected)
    drawn = LM.draw_direction(z.expand(4000, 4), torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.T @ drawn / 4000, expected, atol=0.02, rtol=0)
    known = {tuple(round(v, 4) for v in row) for row in d.tolist()}
    assert {tuple(round(v, 4) for v in row) for row in drawn.tolist()} <= known


def test_padding_is_left_out() -> None:
    hidden = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.long), "attention_mask": mask}
    by_hand = torch.stack([hidden[0, :3].mean(0), hidden[1, 0]])
    by_hand = by_hand / by_hand.norm(dim=1, keepdim=True)
    torch.testing.assert_close(pool_mean(hidden, mask.bool()), by_hand)
    assert LM.select_rows(SimpleNamespace(logits=hidden), batch).shape == (4, 3)
    assert int(mask_real_tokens({"input_ids": batch["input_ids"]}).sum()) == 8


def test_kinds() -> None:
    two, one = PretrainedConfig(num_labels=2), PretrainedConfig(num_labels=1)
    many = PretrainedConfig(num_labels=3, problem_type="multi_label_classification")
    assert choose_objective("classifier", two).unit == "nats per example"
    assert choose_objective("classifier", one).form == "values"
    assert choose_objective("classifier", many).form == "values"
    assert choose_objective("masked-lm", two).unit == "nats per token"
    assert choose_objective("encoder", two).unit == "half squared distance per sentence"

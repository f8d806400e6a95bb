"""Rules and fitted thresholds against the slow reference, on odd sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cptq.activation_sparsity import METHODS
from cptq.activation_sparsity.method import BlockView, Rules
from cptq.inference.activations import count_dropped, multiply
from cptq.layouts.activations import (
    LEFT,
    RIGHT,
    THRESHOLD,
    list_rule_tensors,
    parse_rule,
)
from cptq.types import LayerSpec
from tests.reference import activations as reference

TOKENS, IN, OUT = 5, 7, 3


def draw(label: str) -> dict[str, Tensor]:
    """Tensors of a rule at random, of the shapes and types of the file."""
    torch.manual_seed(1)
    kinds = {"F32": torch.float32, "F16": torch.float16}
    return {
        spec.name[1:]: torch.rand(spec.shape).to(kinds[spec.dtype])
        for spec in list_rule_tensors("", (OUT, IN), label)
    }


@pytest.mark.parametrize(
    "label", ["zeros", "value", "channel", "spread", "low-rank-2", "gate-silu", "gate-gelu_new"]
)
def test_a_rule_is_that_of_the_reference(label: str) -> None:
    torch.manual_seed(0)
    x_TI, W_OI, bias_O = torch.randn(TOKENS, IN), torch.randn(OUT, IN), torch.randn(OUT)
    x_TI[1, 2] = 0.0
    tensors = draw(label)
    with count_dropped() as counted:
        y_TO = multiply(
            parse_rule(label), tensors, x_TI, lambda x: functional.linear(x, W_OI, bias_O)
        )
    expected = reference.multiply(label, tensors, x_TI, W_OI, bias_O)
    torch.testing.assert_close(y_TO.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-5)
    if label.startswith("gate"):
        assert counted.total == 0
        assert 0 < int((y_TO == 0).sum()) < y_TO.numel()
        return
    threshold = tensors[THRESHOLD].double().tolist() if tensors else [0.0]
    kind = "value" if label == "zeros" else parse_rule(label).kind
    dropped = sum(
        abs(v) <= limit
        for x in x_TI.double().tolist()
        for v, limit in zip(x, reference.limits(kind, x, threshold), strict=True)
    )
    assert counted.share == dropped / x_TI.numel() > 0


def test_what_is_not_a_number_shows() -> None:
    x_TI = torch.tensor([[float("nan"), 0.1]])
    for label in ("value", "channel", "spread"):
        tensors = {THRESHOLD: torch.full((2 if label == "channel" else 1,), 0.5)}
        y = multiply(parse_rule(label), tensors, x_TI, lambda x: x.sum(-1, True))
        assert bool(y.isnan().all())


SPECS = [
    LayerSpec(name=role, block=0, role=role, kind="linear", shape=shape, dtype="F32")
    for role, shape in (("q", (5, 7)), ("gate", (9, 7)), ("up", (9, 7)), ("down", (7, 9)))
]


def make_view(method: str, share: float, error: Callable[[Rules], float]) -> BlockView:
    """Four linears and 33 tokens at random."""
    torch.manual_seed(2)
    weights = {spec.name: torch.randn(spec.shape) for spec in SPECS}
    return BlockView(
        layers=SPECS,
        labels=METHODS.get(method).list_rules(SPECS, "relu" if method == "exact" else "silu"),
        inputs={spec.name: torch.randn(33, spec.shape[1]) for spec in SPECS},
        share=share,
        get_weight=weights.__getitem__,
        multiply=lambda name, x: x @ weights[name].T,
        measure_error=error,
    )


def fit(method: str, share: float = 0.4) -> tuple[BlockView, Mapping[str, Any]]:
    view = make_view(method, share, lambda rules: 0.0)
    return view, METHODS.get(method).fit(view)


def flatten(values: Tensor) -> list[float]:
    return [float(v) for v in values.double().reshape(-1)]


def test_wina_r_sparse_and_chess_fit_quantiles() -> None:
    view, rules = fit("wina")
    for name, rule in rules.items():
        norms = [
            float(view.get_weight(name)[:, j].double().norm())
            for j in range(view.inputs[name].shape[1])
        ]
        scores = [abs(float(x[j])) * c for x in view.inputs[name] for j, c in enumerate(norms)]
        t = reference.quantile(scores, 0.4)
        torch.testing.assert_close(rule.tensors[THRESHOLD], torch.tensor([t / c for c in norms]))
    view, rules = fit("r-sparse")
    for name, rule in rules.items():
        t = reference.quantile(flatten(view.inputs[name].abs()), 0.4)
        assert float(rule.tensors[THRESHOLD]) == pytest.approx(t)
        W_OI = view.get_weight(name).double()
        U, s, V = torch.linalg.svd(W_OI)
        best_OI = s[0] * U[:, :1] @ V[:1]  # these are small: the rank is 1
        found_OI = rule.tensors[LEFT].double() @ rule.tensors[RIGHT].double()
        torch.testing.assert_close(found_OI, best_OI, rtol=1e-2, atol=1e-2)
    view, rules = fit("chess")
    x_TI = view.inputs["gate"].double()
    a = [
        [reference.FUNCTIONS["silu"](float(v)) for v in x]
        for x in x_TI @ view.get_weight("gate").double().T
    ]
    u_F = (x_TI @ view.get_weight("up").double().T).abs().mean(0).tolist()
    t = reference.quantile([abs(v) * u for row in a for v, u in zip(row, u_F, strict=True)], 0.4)
    expected = torch.tensor([t / u for u in u_F])
    torch.testing.assert_close(rules["gate"].tensors[THRESHOLD], expected, rtol=1e-4, atol=1e-5)
    assert {name: rule.label for name, rule in rules.items()} == {
        "q": "value",
        "gate": "gate-silu",
        "down": "zeros",
    }


def test_statistical_top_k_drops_the_share_whatever_the_size_of_a_token() -> None:
    view, rules = fit("statistical-top-k")
    for name, rule in rules.items():
        z = float(rule.tensors[THRESHOLD])
        standardised = []
        for x in view.inputs[name].double().tolist():
            mean, above = (reference.limits("spread", x, [t])[0] for t in (0.0, 1.0))
            standardised += [(abs(v) - mean) / (above - mean) for v in x]
        assert z == pytest.approx(reference.quantile(standardised, 0.4), abs=1e-5)


@pytest.mark.parametrize("share", [0.35, 0.6])
def test_teal_splits_as_the_whole_greedy_search_does(share: float) -> None:
    """Errors that grow by the square of a share: then no step becomes cheaper."""
    weights = {"q": 1.0, "gate": 5.0, "up": 2.0, "down": 40.0}
    view = make_view("teal", share, lambda rules: 0.0)

    def share_of(name: str, t: float) -> float:
        return float((view.inputs[name].abs() <= t).double().mean()) if t else 0.0

    def error(shares: Mapping[str, float]) -> float:
        return sum(weights[name] * p**2 for name, p in shares.items())

    def measure(rules: Rules) -> float:
        shares = {n: share_of(n, float(r.tensors[THRESHOLD])) for n, r in rules.items()}
        return error(shares)

    rules = METHODS.get("teal").fit(make_view("teal", share, measure))
    names = [spec.name for spec in SPECS]

    def rounded(shares: list[float]) -> dict[str, float]:
        sizes = {name: flatten(view.inputs[name].abs()) for name in names}
        limits = {n: reference.quantile(sizes[n], p) for n, p in zip(names, shares, strict=True)}
        return {n: share_of(n, t) for n, t in limits.items()}

    expected = reference.split(
        [spec.numel for spec in SPECS], lambda shares: error(rounded(list(shares))), share, 0.1
    )
    found = {n: share_of(n, float(rules[n].tensors[THRESHOLD])) for n in names}
    assert found == pytest.approx(rounded(expected), abs=1e-6)
    mean = sum(found[spec.name] * spec.numel for spec in SPECS) / sum(s.numel for s in SPECS)
    assert mean == pytest.approx(share, abs=0.01)

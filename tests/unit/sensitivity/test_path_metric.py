"""Gradients on the path to Q(W), and the metrics made of them, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cptq.calibration.batches import select_gradient_rows
from cptq.calibration.objective import choose_objective
from cptq.checkpoint.weights import get_weight
from cptq.errors import CalibrationError
from cptq.sensitivity.path_metric import PATH_TOKENS, Term, compute_path_gradients
from cptq.sensitivity.rounding import NearestRounding, compute_rounding_error
from cptq.types import Candidate, Progress
from tests.conftest import TinyModel
from tests.reference import gradients as truth
from tests.reference.sensitivity import loaded, random_calibration
from tests.reference.whole_passes import move_all
from tests.unit.sensitivity.conftest import Score

DENSE = Candidate(bits=16)
W3 = Candidate(bits=3, group_size=16)
W5 = Candidate(bits=5, group_size=16)
W8 = Candidate(bits=8, group_size=16)
SPARSE = Candidate(bits=16, sparsity=0.3, pattern="unstructured")
KINDS = ("llama", "opt", "bert", "bert-encoder", "bert-mlm")


def assert_sums(term: Term, products: list[Tensor], share: float) -> None:
    """The term is the sums over the products g d of a unit's layers, but for a share of them."""
    size = sum(float(p.abs().sum()) for p in products)
    assert term.absolute == pytest.approx(size, rel=share)
    along = sum(float(p.sum()) for p in products)
    assert term.directional == pytest.approx(along, rel=share, abs=share * size)


@pytest.mark.parametrize("arch", KINDS)
@pytest.mark.parametrize("candidate", [W3, SPARSE], ids=["w3", "sparse"])
def test_terms_equal_autograd_in_float64(
    arch: str, candidate: Candidate, tiny_model: TinyModel
) -> None:
    model = loaded(tiny_model(arch))
    objective = choose_objective(model.kind, model.config)
    rows = select_gradient_rows(random_calibration(model).batches, model.kind, 150)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    found = compute_path_gradients(
        model, rows, objective, NearestRounding(),
        candidates=(candidate, DENSE), points=(0.5, 1.0), emit=lambda event: None,
    )  # fmt: skip
    assert all(torch.equal(before[n], v) for n, v in model.module.state_dict().items())
    assert all(weight.grad is None for weight in model.module.parameters())
    assert set(found.terms) == {(candidate, 0.5), (candidate, 1.0)}
    specs = {s.name: s for unit in model.units for s in unit.layers}
    W = {name: get_weight(model.linear(name)) for name in specs}
    d = {name: -compute_rounding_error(W[name], spec, candidate) for name, spec in specs.items()}
    for place in (0.5, 1.0):
        there = {name: W[name] + place * d[name] for name in specs}
        g, loss = truth.gradients(model, rows, objective, there)
        assert found.divergence[candidate, place] == pytest.approx(loss, rel=1e-3)
        for unit in model.units:
            term = found.terms[candidate, place][unit.name]
            assert_sums(term, [g[s.name] * d[s.name].double() for s in unit.layers], 1e-3)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "qwen3_moe", "bert", "mpnet"])
def test_block_by_block_equals_all_weights_moved_at_once(arch: str, tiny_model: TinyModel) -> None:
    """To float32 rounding, also where blocks run that hold experts or transposed weights."""
    model = loaded(tiny_model(arch), conv1d=True)
    objective = choose_objective(model.kind, model.config)
    rows = select_gradient_rows(random_calibration(model).batches, model.kind, 150)
    found = compute_path_gradients(
        model, rows, objective, NearestRounding(),
        candidates=(W3,), points=(0.5,), emit=lambda event: None,
    )  # fmt: skip
    specs = {s.name: s for unit in model.units for s in unit.layers}
    W = {name: get_weight(model.linear(name)).clone() for name in specs}
    d = {name: -compute_rounding_error(W[name], spec, W3) for name, spec in specs.items()}
    there = {name: W[name] + 0.5 * d[name] for name in specs}
    g, loss = move_all(model, rows, objective, there)
    assert found.divergence[W3, 0.5] == pytest.approx(loss, rel=1e-5)
    for unit in model.units:
        term = found.terms[W3, 0.5][unit.name]
        assert_sums(term, [g[s.name] * d[s.name] for s in unit.layers if s.name in g], 1e-4)


def test_a_weight_that_two_blocks_share_is_moved_in_both(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    model.module.model.layers[1].mlp = model.module.model.layers[0].mlp
    units = tuple(u for u in model.units if "layers.1.mlp" not in u.name)
    object.__setattr__(model, "units", units)
    objective = choose_objective(model.kind, model.config)
    rows = select_gradient_rows(random_calibration(model).batches, model.kind, 100)
    found = compute_path_gradients(
        model, rows, objective, NearestRounding(),
        candidates=(W3,), points=(1.0,), emit=lambda event: None,
    )  # fmt: skip
    specs = {s.name: s for unit in units for s in unit.layers}
    W = {name: get_weight(model.linear(name)).clone() for name in specs}
    d = {name: -compute_rounding_error(W[name], spec, W3) for name, spec in specs.items()}
    g, loss = move_all(model, rows, objective, {name: W[name] + d[name] for name in specs})
    assert found.divergence[W3, 1.0] == pytest.approx(loss, rel=1e-5)
    for unit in units:
        size = sum(float((g[s.name] * d[s.name]).abs().sum()) for s in unit.layers)
        assert found.terms[W3, 1.0][unit.name].absolute == pytest.approx(size, rel=1e-4)


@pytest.mark.parametrize("arch", ["llama", "bert-encoder"])
def test_the_metrics_combine_the_terms_as_they_say(
    arch: str, tiny_model: TinyModel, score: Score
) -> None:
    model = loaded(tiny_model(arch))
    objective = choose_objective(model.kind, model.config)
    rows = select_gradient_rows(random_calibration(model).batches, model.kind, PATH_TOKENS)
    terms = compute_path_gradients(
        model, rows, objective, NearestRounding(),
        candidates=(W3,), points=(0.5, 1.0), emit=lambda event: None,
    ).terms  # fmt: skip
    half, end = terms[W3, 0.5], terms[W3, 1.0]
    tables = score(model, ("taylor-quantized", "taylor-integrated", "delta-loss"), (W3, DENSE))
    for unit in model.units:
        u = unit.name
        expected = {
            "taylor-quantized": end[u].directional / 2,
            "taylor-integrated": (4 * half[u].directional + end[u].directional) / 6,
            "delta-loss": end[u].absolute,
        }
        for name, value in expected.items():
            assert tables[name].scores[u][W3] == pytest.approx(max(value, 0), rel=1e-4, abs=1e-7)
            assert tables[name].scores[u][DENSE] == 0.0
            assert tables[name].per_unit[u] == pytest.approx(value, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("arch", KINDS)
def test_integrated_scores_add_up_to_the_divergence_of_the_rounded_model(
    arch: str, tiny_model: TinyModel, score: Score
) -> None:
    """Exactly but for the rule; with one candidate `per_unit` holds the scores, signs and all."""
    for candidate, rel in ((W5, 0.05), (W3, 0.12)):
        model = loaded(tiny_model(arch))
        table = score(model, ["taylor-integrated"], (candidate, DENSE))["taylor-integrated"]
        whole = table.details["whole_model_divergence"][candidate.label]
        assert sum(table.per_unit.values()) == pytest.approx(whole, rel=rel, abs=1e-6)
        for unit, number in table.per_unit.items():
            assert table.scores[unit][candidate] == max(number, 0.0)


def test_at_many_bits_half_the_gradient_at_the_end_is_enough(
    tiny_model: TinyModel, score: Score
) -> None:
    model = loaded(tiny_model("llama"))
    table = score(model, ["taylor-quantized"], (W8,))["taylor-quantized"]
    total = sum(row[W8] for row in table.scores.values())
    assert total == pytest.approx(table.details["whole_model_divergence"]["w8g16"], rel=0.05)


def test_progress_is_told_and_the_model_comes_back_from_a_failure(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    objective = choose_objective(model.kind, model.config)
    rows = select_gradient_rows(random_calibration(model).batches, model.kind, 100)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    flags = [p.requires_grad for p in model.module.parameters()]
    events: list[Progress] = []

    def interrupt(event: object) -> None:
        assert isinstance(event, Progress)
        events.append(event)
        if event.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_path_gradients(
            model,
            rows,
            objective,
            NearestRounding(),
            candidates=(W3, W8),
            points=(1.0,),
            emit=interrupt,
        )
    assert {(event.stage, event.total) for event in events} == {("gradients", 2)}
    assert [event.done for event in events] == [0, 0, 1]
    assert all(torch.equal(before[n], v) for n, v in model.module.state_dict().items())
    assert [p.requires_grad for p in model.module.parameters()] == flags


def test_an_output_that_is_not_finite_is_named(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    objective = choose_objective(model.kind, model.config)
    rows = select_gradient_rows(random_calibration(model).batches, model.kind, 100)
    norm = model.module.get_submodule("model.norm")
    with torch.no_grad():
        norm.weight.fill_(float("inf"))
    with pytest.raises(CalibrationError, match="rounded model"):
        compute_path_gradients(
            model, rows, objective, NearestRounding(),
            candidates=(W3,), points=(1.0,), emit=lambda event: None,
        )  # fmt: skip

"""A family is tried with the runtime's loader before any work, whatever the candidates are."""

from __future__ import annotations

from typing import Any

import pytest

from cptq.artifact.trial_load import Trial
from cptq.checkpoint.loader import load_model
from cptq.config import RUNTIMES, ModelSettings
from cptq.errors import ModelError
from cptq.pipeline import load_check
from cptq.types import Candidate
from tests.conftest import TinyModel


def test_candidates_with_narrow_scales_are_tried_by_their_plain_form(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime is named as a way out if its loader opens the model, with something packed."""
    model = load_model(ModelSettings(model=str(tiny_model("llama"))), lambda _: None)
    tried: list[tuple[str, Candidate]] = []

    def refuse(_model: Any, form: str, candidate: Candidate, *_: Any, **__: Any) -> Trial:
        tried.append((form, candidate))
        return Trial(why="AttributeError") if form == "compressed-tensors" else Trial()

    monkeypatch.setattr(load_check, "try_loading", refuse)
    monkeypatch.setattr(load_check, "_is_known", lambda _: False)
    stock, narrow = RUNTIMES["transformers"], Candidate(bits=4, group_size=16, scales="e4m3")
    with pytest.raises(ModelError, match="does not load a compressed LlamaForCausalLM") as raised:
        load_check.check_loadable(
            model, stock, stock.format, [narrow], model.units, lambda _: None,
            trust_remote_code=False,
        )  # fmt: skip
    assert raised.value.allowed == "--runtime cptq, which loads it"
    assert {form for form, _ in tried} == {"compressed-tensors", "packed"}
    assert {candidate for _, candidate in tried} == {Candidate(bits=4, group_size=16)}
    monkeypatch.setattr(load_check, "explain_layer_refusal", lambda *_: "packed nowhere")
    tried.clear()
    load_check.check_loadable(
        model, stock, stock.format, [narrow], model.units, lambda _: None, trust_remote_code=False
    )
    assert not tried


def test_uneven_levels_are_tried_by_even_ones(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial's codes are zeros, and no table has a 0."""
    model = load_model(ModelSettings(model=str(tiny_model("llama"))), lambda _: None)
    monkeypatch.setattr(load_check, "_is_known", lambda _: False)
    said: list[Any] = []
    runtime, uneven = RUNTIMES["cptq"], Candidate(bits=4, group_size=16, levels="nl", scales="row")
    load_check.check_loadable(
        model, runtime, "packed", [uneven], model.units, said.append, trust_remote_code=False
    )
    assert not said

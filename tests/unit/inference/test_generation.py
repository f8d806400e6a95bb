"""Decoding, against a loop that computes the whole text anew for each token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cptq
from cptq.inference import generation
from cptq.inference.generation import Decoded, Sampling, decode
from tests.conftest import TinyModel


@pytest.fixture
def model(tiny_model: TinyModel) -> torch.nn.Module:
    return cptq.load(tiny_model("llama"), device="cpu")


def decode_slowly(model: torch.nn.Module, ids_BT: Tensor, steps: int) -> list[tuple[int, ...]]:
    found = []
    with torch.no_grad():
        for _ in range(steps):
            token_B = model(input_ids=ids_BT).logits[:, -1].argmax(-1)
            found.append(tuple(token_B.tolist()))
            ids_BT = torch.cat([ids_BT, token_B[:, None]], dim=1)
    return found


def draw(rows: int) -> Tensor:
    return torch.randint(300, (rows, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_tokens_are_the_most_likely_ones(model: torch.nn.Module, rows: int) -> None:
    heard: list[list[int]] = []
    found = decode(model, draw(rows), new_tokens=7, receive=heard.append)
    assert list(found.steps) == decode_slowly(model, draw(rows), 7)
    assert [tuple(step) for step in heard] == list(found.steps)
    assert found.way == "generate"


def test_nothing_ends_a_text_but_what_was_asked_for(model: torch.nn.Module) -> None:
    """Neither the checkpoint's end token nor its penalties count."""
    own = model.generation_config
    free = decode(model, draw(1), new_tokens=7).steps
    own.eos_token_id, own.repetition_penalty, own.max_new_tokens = free[2][0], 9.0, 3
    assert decode(model, draw(1), new_tokens=7).steps == free
    assert decode(model, draw(1), new_tokens=7, stop=free[2]).steps == free[:3]
    assert model.generation_config is own


def test_the_same_seed_draws_the_same_tokens(model: torch.nn.Module) -> None:
    hot, draws = 5.0, []
    for seed in (1, 1, 2):
        sampling = Sampling(temperature=hot, seed=seed)
        draws.append(decode(model, draw(1), new_tokens=12, sampling=sampling).steps)
    assert draws[0] == draws[1] != draws[2]
    narrow = Sampling(temperature=hot, top_p=1e-6, seed=1)
    greedy = decode(model, draw(1), new_tokens=12).steps
    assert decode(model, draw(1), new_tokens=12, sampling=narrow).steps == greedy


def test_times_lie_where_the_steps_do(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(generation.time, "perf_counter", lambda: float(next(clock)))
    known = [decode(model, draw(1), new_tokens=n).known for n in (1, 4)]
    assert [len(times) for times in known] == [1, 4]


def test_first_and_later_seconds() -> None:
    steps = ((1,), (2,), (3,))
    found = Decoded(way="generate", steps=steps, began=10.0, known=(12.0, 12.5, 13.5))
    assert (found.first_seconds, found.later_seconds) == (2.0, 1.5)

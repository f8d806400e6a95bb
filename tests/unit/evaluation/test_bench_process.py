"""The process of `cptq bench`: its requests, and both engines."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cptq.errors import EvaluationError
from cptq.evaluation.bench.process import ENGINES, answer
from cptq.evaluation.bench.with_llama_cpp import LlamaCppEngine
from cptq.evaluation.bench.with_transformers import TransformersEngine
from tests.conftest import TinyModel

ROWS = [[5, 6, 7], [8, 9, 10]]


def make_engine(tiny_model: TinyModel, arch: str, kind: str) -> TransformersEngine:
    engine = TransformersEngine(
        path=str(tiny_model(arch)), kind=kind, device="cpu", dtype="bfloat16", threads=1,
        trust_remote_code=False,
    )  # fmt: skip
    assert engine.model is None  # nothing is loaded before it is asked for
    return engine


def test_the_engines_are_there() -> None:
    assert ENGINES.get("transformers") is TransformersEngine
    assert ENGINES.get("llama.cpp") is LlamaCppEngine


def test_a_causal_model_generates(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model, "llama", "causal-lm")
    loaded = answer(engine, {"do": "load"})
    assert loaded["load_seconds"] > 0
    assert loaded["import_bytes"] > 0
    assert loaded["loaded_bytes"] > 0
    assert str(engine.model.dtype) == "torch.bfloat16"
    found = answer(engine, {"do": "run", "rows": ROWS, "new_tokens": 4})
    assert found["way"] == "generate"
    assert found["first_seconds"] > 0
    assert found["later_seconds"] > 0
    end = answer(engine, {"do": "finish"})
    assert 0 < end["used_bytes"] <= end["peak_bytes"] + 2**20


@pytest.mark.parametrize(("arch", "kind"), [("bert", "classifier"), ("bert-encoder", "encoder")])
def test_another_model_computes_a_forward_pass(tiny_model: TinyModel, arch: str, kind: str) -> None:
    engine = make_engine(tiny_model, arch, kind)
    answer(engine, {"do": "load"})
    seen: list[tuple[int, ...]] = []
    engine.model.register_forward_pre_hook(
        lambda _, __, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    found = answer(engine, {"do": "run", "rows": ROWS, "new_tokens": 4})
    assert seen == [(2, 3)]
    assert set(found) == {"first_seconds", "way"}
    assert found["way"] == "forward pass"


class FakeLlamaCpp:
    """A model of 20 tokens whose next token is the last one plus one; records what it computes."""

    WIDTH = 20

    def __init__(self) -> None:
        self.steps: list[list[tuple[int, int, int]]] = []
        self.cleared, self.contexts, self.fails = 0, [], False
        self.logits: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        kinds = {"llama_model_default_params": SimpleNamespace}
        return kinds.get(name, lambda *_: object())

    def llama_context_default_params(self) -> SimpleNamespace:
        return SimpleNamespace()

    def llama_init_from_model(self, model: Any, parameters: SimpleNamespace) -> Any:
        self.contexts.append(parameters)
        return object()

    def llama_batch_init(self, tokens: int, *_: int) -> SimpleNamespace:
        names = ("token", "pos", "n_seq_id", "logits")
        lists = {name: [0] * tokens for name in names}
        return SimpleNamespace(**lists, seq_id=[[0] for _ in range(tokens)], n_tokens=0)

    def llama_memory_clear(self, memory: Any, data: bool) -> None:
        assert data
        self.cleared += 1

    def llama_decode(self, context: Any, batch: SimpleNamespace) -> int:
        used = range(batch.n_tokens)
        self.steps.append([(batch.seq_id[i][0], batch.pos[i], batch.token[i]) for i in used])
        self.logits = {}
        for i in used:
            if batch.logits[i]:
                row = np.zeros(self.WIDTH, dtype=np.float32)
                row[(batch.token[i] + 1) % self.WIDTH] = 1
                self.logits[i] = np.ctypeslib.as_ctypes(row)
        return int(self.fails)

    def llama_vocab_n_tokens(self, vocabulary: Any) -> int:
        return self.WIDTH

    def llama_get_logits_ith(self, context: Any, index: int) -> Any:
        return self.logits[index]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLlamaCpp:
    found = FakeLlamaCpp()
    monkeypatch.setitem(sys.modules, "llama_cpp", found)
    return found


def test_llama_cpp_gets_every_row_at_its_positions(library: FakeLlamaCpp) -> None:
    engine = LlamaCppEngine(path="m.gguf", threads=3, most_rows=2, most_tokens=300)
    answer(engine, {"do": "load"})
    for _ in range(2):
        found = answer(engine, {"do": "run", "rows": ROWS, "new_tokens": 3})
        assert library.steps == [
            [(0, 0, 5), (0, 1, 6), (0, 2, 7), (1, 0, 8), (1, 1, 9), (1, 2, 10)],
            [(0, 3, 8), (1, 3, 11)],
            [(0, 4, 9), (1, 4, 12)],
        ]
        library.steps.clear()
    assert found["way"] == "llama.cpp"
    assert (library.cleared, len(library.contexts)) == (2, 1)
    (context,) = library.contexts
    assert (context.n_ctx, context.n_batch, context.n_seq_max) == (1024, 600, 2)
    assert (context.n_threads, context.n_threads_batch) == (3, 3)


def test_llama_cpp_fails_in_one_sentence(
    library: FakeLlamaCpp, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = LlamaCppEngine(path="m.gguf", threads=1, most_rows=2, most_tokens=9)
    engine.load()
    library.fails = True
    with pytest.raises(EvaluationError, match=r"6 tokens of m\.gguf"):
        engine.run(ROWS, 3)
    monkeypatch.setattr(FakeLlamaCpp, "llama_model_load_from_file", lambda *_: None, raising=False)
    with pytest.raises(EvaluationError, match=r"cannot load m\.gguf"):
        engine.load()


def test_times_are_those_between_the_steps(
    library: FakeLlamaCpp, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    place = "cptq.evaluation.bench.with_llama_cpp.time.perf_counter"
    monkeypatch.setattr(place, lambda: float(next(clock)) ** 2)
    engine = LlamaCppEngine(path="m.gguf", threads=1, most_rows=2, most_tokens=9)
    found = engine.run(ROWS, 3)
    assert (found["first_seconds"], found["later_seconds"]) == (1.0, 3.0)

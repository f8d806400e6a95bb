"""`bench`: whose turn it is, what is computed from the seconds, what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar, Self

import gguf
import numpy as np
import pytest
import torch

import cptq
from cptq.config import BenchSettings, ModelSettings
from cptq.errors import CptqError, EvaluationError, ModelError, OutputExistsError, UsageError
from cptq.pipeline import bench as function
from cptq.pipeline.bench import compute_speeds, draw_prompt, find_cpu_name, plan_turns
from cptq.pipeline.bench_subjects import Subject, check_alike, check_lengths, describe_subjects
from cptq.report.bench import BenchOutcome
from tests.conftest import Heard, TinyModel
from tests.tiny_models import POSITIONS
from tests.unit.artifact import builders


class FakeWorker:
    """Answers with seconds that depend on the model and the call; records all requests."""

    started: ClassVar[list[FakeWorker]] = []
    order: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, name: str, module: str, job: dict[str, Any], threads: int) -> None:
        self.name, self.job, self.runs = name, job, 0
        self.closed = False
        self.started.append(self)

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        place = 1 + self.started.index(self)
        if do == "load":
            return {"load_seconds": 1.0 * place, "import_bytes": 100.0, "loaded_bytes": 300.0}
        if do == "finish":
            return {"used_bytes": 350.0, "peak_bytes": 400.0 * place}
        self.runs += 1
        self.order.append((self.name, len(more["rows"])))
        found = {"first_seconds": float(self.runs), "way": "generate"}
        return found if "cl" in self.name else found | {"later_seconds": 0.5 * place}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[FakeWorker]:
    monkeypatch.setattr(FakeWorker, "started", [])
    monkeypatch.setattr(FakeWorker, "order", [])
    monkeypatch.setattr(sys.modules["cptq.pipeline.bench"], "Worker", FakeWorker)
    return FakeWorker.started


def run(heard: Heard, *sources: Path | str, **options: Any) -> BenchOutcome:
    first, *others = map(str, sources)
    given = {"others": tuple(others), "prompt_tokens": 6, "new_tokens": 5, "repeats": 3, **options}
    return function(BenchSettings(model=ModelSettings(model=first), **given), heard)


def test_figures_come_from_the_seconds(
    tiny_model: TinyModel, heard: Heard, workers: list[FakeWorker], tmp_path: Path
) -> None:
    one, two = tiny_model("llama"), tiny_model("gpt2")
    out = tmp_path / "b.json"
    found = run(heard, one, two, batch_size=(1, 4), threads=2, out=out).bench
    first, second = found.models
    assert first.find("load") == 1.0
    assert first.find("first_token", 1) == 1.0  # the first run of all
    # then a warm-up at 1 and 4 (runs 2 and 3), and repetitions at 1 (4, 6, 8) and 4 (5, 7, 9)
    assert [f.values for f in first.figures if (f.name, f.batch_size) == ("prefill", 1)] == [
        (6 / 4, 6 / 6, 6 / 8)
    ]
    assert first.find("prefill", 4) == 4 * 6 / 7
    assert (first.find("decode", 1), first.find("decode", 4)) == (4 / 0.5, 4 * 4 / 0.5)
    assert second.find("decode", 1) == 4 / 1.0
    assert (first.find("loaded_memory"), first.find("peak_memory")) == (200.0, 300.0)
    assert first.find("used_memory") == 250.0
    assert second.find("file") == (two / "model.safetensors").stat().st_size
    assert [worker.job["dtype"] for worker in workers] == ["float32", "float32"]
    assert all(worker.closed and worker.job["threads"] == 2 for worker in workers)
    data = json.loads(out.read_text())
    assert (data["command"], data["threads"], data["batch_sizes"]) == ("bench", 2, [1, 4])
    assert data["versions"]["torch"]
    assert data["cpu"]
    (decode,) = [
        figure
        for figure in data["models"][1]["figures"]
        if (figure["name"], figure["batch_size"]) == ("decode", 4)
    ]
    assert (decode["ratio_to_first"], len(decode["values"])) == (0.5, 3)
    with pytest.raises(OutputExistsError):
        run(heard, one, out=out)
    assert run(heard, one, out=out, overwrite=True).out == out


def test_models_take_turns_and_the_first_one_rotates(
    tiny_model: TinyModel, heard: Heard, workers: list[FakeWorker]
) -> None:
    sources = [tiny_model(arch) for arch in ("llama", "gpt2", "opt")]
    run(heard, *sources, batch_size=(2,), repeats=2)
    a, b, c = (path.name for path in sources)
    rounds = [(a, b, c), (a, b, c), (b, c, a), (c, a, b)]  # first runs, warm-up, repetitions
    assert FakeWorker.order == [(name, 2) for names in rounds for name in names]
    assert heard.stages == {"load", "measure"}


def test_the_plan_of_turns() -> None:
    turns = plan_turns(3, (1, 8), 4)
    assert Counter((t.repeat, t.batch_size, t.model) for t in turns) == Counter(
        (r, b, m) for r in range(4) for b in (1, 8) for m in range(3)
    )
    assert [t.model for t in turns if t.batch_size == 8] == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2]
    assert [t.repeat for t in turns] == sorted(t.repeat for t in turns)


def test_the_prompt_is_the_same_for_the_same_seed() -> None:
    rows = draw_prompt(3, 50, 17, seed=1)
    assert rows == draw_prompt(3, 50, 17, seed=1) != draw_prompt(3, 50, 17, seed=2)
    assert {len(row) for row in rows} == {50}
    assert {token for row in rows for token in row} == set(range(17))


def test_speeds_of_a_forward_pass_are_sentences() -> None:
    (figure,) = compute_speeds([{"first_seconds": 2.0}, {"first_seconds": 4.0}], 8, 5, 9)
    assert (figure.name, figure.values, figure.batch_size) == ("forward", (4.0, 2.0), 8)


def test_a_classifier_computes_sentences(
    tiny_model: TinyModel, heard: Heard, workers: list[FakeWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys.modules["cptq.pipeline.bench_subjects"], "name_models", lambda _: ["cl"]
    )
    (model,) = run(heard, tiny_model("bert"), batch_size=(4,)).bench.models
    assert (model.kind, model.find("forward", 4)) == ("classifier", 4 / 4)
    assert model.find("first_output", 4) == 1.0
    assert model.find("decode", 4) is None


def test_models_of_several_kinds_are_refused_by_name(tiny_model: TinyModel, heard: Heard) -> None:
    with pytest.raises(UsageError) as caught:
        run(heard, tiny_model("llama"), tiny_model("bert"))
    for word in (tiny_model("llama").name, "causal-lm", tiny_model("bert").name, "classifier"):
        assert word in caught.value.problem


def test_a_prompt_beyond_the_context_is_refused(tiny_model: TinyModel, heard: Heard) -> None:
    for arch, total in (("llama", POSITIONS + 1), ("bert", POSITIONS + 1)):
        new = 2 if arch == "llama" else 9
        prompt = total - new if arch == "llama" else total
        with pytest.raises(UsageError) as caught:
            run(heard, tiny_model(arch), prompt_tokens=prompt, new_tokens=new)
        assert str(total) in caught.value.problem
        assert str(POSITIONS) in caught.value.problem


def make_subject(**fields: Any) -> Subject:
    given = {
        "name": "m", "source": "m", "path": Path("m"), "engine": "transformers",
        "kind": "causal-lm", "vocabulary": 9, "context": None, "device": "cpu",
        "dtype": "float32", "file_bytes": 1,
    }  # fmt: skip
    return Subject(**{**given, **fields})


def test_what_is_alike_and_what_fits() -> None:
    check_alike([make_subject(), make_subject()])
    with pytest.raises(UsageError):
        check_alike([make_subject(), make_subject(kind="encoder")])
    check_lengths([make_subject()], 10**9, 2)
    check_lengths([make_subject(context=12)], 10, 2)
    with pytest.raises(UsageError):
        check_lengths([make_subject(context=12)], 10, 3)
    check_lengths([make_subject(context=10, kind="encoder")], 10, 3)


def test_a_model_that_is_absent_or_damaged_is_named(heard: Heard, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"\./absent"):
        run(heard, "./absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CptqError, match="empty"):
        run(heard, tmp_path / "empty")
    (tmp_path / "m.gguf").write_bytes(b"GGUF and nothing that follows from it")
    with pytest.raises(CptqError, match=r"m\.gguf"):
        run(heard, tmp_path / "m.gguf")


def write_header(path: Path, architecture: str, *, causal: bool) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(40)
    if not causal:
        writer.add_causal_attention(False)
    writer.add_tensor("token_embd.weight", np.zeros((12, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_described_by_its_header(
    tiny_model: TinyModel, heard: Heard, tmp_path: Path, workers: list[FakeWorker]
) -> None:
    path = write_header(tmp_path / "m.gguf", "llama", causal=True)
    given = BenchSettings(model=ModelSettings(model=str(path)))
    (found,) = describe_subjects(given, heard)
    assert (found.vocabulary, found.context, found.kind) == (12, 40, "causal-lm")
    assert (found.engine, found.dtype) == ("llama.cpp", "as stored")
    assert found.file_bytes == path.stat().st_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["cptq.pipeline.bench"], "version", lambda _: "1.2")
        result = run(heard, path, tiny_model("llama"), batch_size=(1, 2)).bench
    assert result.versions["llama-cpp-python"] == "1.2"
    job = workers[0].job
    assert (job["most_rows"], job["most_tokens"], job["path"]) == (2, 6 + 5, str(path))


def test_a_gguf_file_of_an_encoder_is_refused(heard: Heard, tmp_path: Path) -> None:
    path = write_header(tmp_path / "m.gguf", "bert", causal=False)
    with pytest.raises(ModelError) as caught:
        run(heard, path)
    assert "bert" in caught.value.problem


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
def test_llama_cpp_runs_beside_transformers(
    tiny_model: TinyModel, heard: Heard, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    path = tiny_model("llama", **sizes, num_key_value_heads=2, dtype=torch.float16)
    model = builders.load(path)
    layers, _ = builders.compress(model, bits=(8,))
    content = builders.build_content(model, layers, lambda event: None)
    builders.write_gguf(content, tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.gguf")
    found = run(heard, path, file, batch_size=(1, 2), repeats=1, threads=1).bench
    assert [model.way for model in found.models] == ["generate", "llama.cpp"]
    assert all((model.find("decode", 2) or 0) > 0 for model in found.models)


def test_the_name_of_the_processor() -> None:
    assert find_cpu_name("processor : 0\nmodel name\t: A CPU @ 2: fast\nmodel name: B") == (
        "A CPU @ 2: fast"
    )
    assert find_cpu_name("processor : 0\nmodel name :\n") is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"new_tokens": 1}, "--new-tokens"),
        ({"prompt_tokens": 0}, "--prompt-tokens"),
        ({"repeats": 0}, "--repeats"),
        ({"threads": 0}, "--threads"),
        ({"batch_size": "1,0"}, "--batch-size"),
        ({"batch_size": ()}, "--batch-size"),
        ({"batch_size": "many"}, "many"),
        ({"repeat": 3}, "repeat"),
        ({"dtype": "int8"}, "--dtype"),
    ],
)
def test_bad_options(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        cptq.bench("no/such-model", **options)


@pytest.mark.slow
def test_real_processes(tiny_model: TinyModel, heard: Heard) -> None:
    path = tiny_model("llama", tied=True)
    (model,) = run(heard, path, batch_size=(1, 2), repeats=1, threads=1).bench.models
    assert model.way == "generate"
    names = {(figure.name, figure.batch_size) for figure in model.figures}
    assert {("decode", 1), ("decode", 2), ("first_token", 1), ("peak_memory", None)} <= names
    assert all(f.median > 0 for f in model.figures if f.name != "loaded_memory")
    assert model.import_bytes > 2**20


def test_a_process_that_cannot_load_is_one_sentence(
    tiny_model: TinyModel, heard: Heard, tmp_path: Path
) -> None:
    path = tmp_path / "cut"
    path.mkdir()
    for file in tiny_model("llama").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-999])
    with pytest.raises(CptqError) as caught:
        run(heard, path)
    assert "\n" not in str(caught.value)
    assert "cut" in str(caught.value)
    assert isinstance(caught.value, EvaluationError | ModelError)

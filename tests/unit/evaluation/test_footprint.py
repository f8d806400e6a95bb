from __future__ import annotations

import json
import subprocess
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cptq.errors import EvaluationError
from cptq.evaluation import footprint_process
from cptq.evaluation.task import EvalOptions, evaluate
from cptq.evaluation.tasks.footprint import count_weight_bytes, measure_footprint

NUMBERS = {
    "load_seconds": 1.0,
    "first_output_seconds": 2.0,
    "import_bytes": 100.0,
    "peak_bytes": 150.0,
    "decode_tokens_per_second": 7.0,
    "prefill_tokens_per_second": 70.0,
    "decode_tokens_per_second_stderr": 0.5,
    "repeats": 3.0,
}


def test_weight_bytes_are_those_of_the_shards(tiny_model: Callable[..., Path]) -> None:
    path = tiny_model("llama", shards=True)
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 1
    assert count_weight_bytes(path) == sum(len(shard.read_bytes()) for shard in shards)


def test_pickled_weights_count_where_there_are_no_others(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"12345")
    assert count_weight_bytes(tmp_path) == 5


def test_results_by_task(load, heard, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def run(command: list[str], **_: object) -> Namespace:
        seen.append(command)
        return Namespace(stdout="noise\n" + json.dumps(NUMBERS) + "\n")

    monkeypatch.setattr(subprocess, "run", run)
    model = load("llama")
    found = {(r.task, r.metric): r for r in measure_footprint(model, EvalOptions(), heard)}
    values = {key: result.value for key, result in found.items()}
    assert values == {
        ("size", "weight_bytes"): (model.path / "model.safetensors").stat().st_size,
        ("load", "seconds"): 1,
        ("load", "seconds_to_first_output"): 2,
        ("memory", "peak_resident"): 150,
        ("memory", "peak_above_imports"): 50,
        ("speed", "decode"): 7,
        ("speed", "prefill"): 70,
    }
    assert (found["speed", "decode"].samples, found["speed", "decode"].stderr) == (3, 0.5)
    without = {key: result.notes[-1] for key, result in found.items() if result.stderr is None}
    assert without.pop(("size", "weight_bytes")) == "no standard error: counted, not measured"
    assert set(without.values()) == {"no standard error: measured once"}
    assert "--trust-remote-code" not in seen[0]
    assert seen[0][3:6] == [str(model.path), "--kind", "causal-lm"]


def test_a_failing_process_is_one_sentence(load, heard, monkeypatch) -> None:
    def run(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="Traceback\nValueError: no\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(EvaluationError, match="ValueError: no"):
        measure_footprint(load("llama"), EvalOptions(), heard)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gpt2", "bert"])
def test_the_task_in_a_fresh_process(load, heard, arch: str) -> None:
    results = evaluate(load(arch), "footprint", EvalOptions(), heard)
    assert all(r.stderr is not None and r.stderr > 0 for r in results if r.task == "speed")
    found = {(r.task, r.metric): r.value for r in results}
    assert 0 < found["load", "seconds"] < found["load", "seconds_to_first_output"]
    assert 0 < found["memory", "peak_above_imports"] < found["memory", "peak_resident"]
    speed = "forward" if arch == "bert" else "decode"
    assert found["speed", speed] > 0


def test_what_the_process_does_with_an_encoder(tiny_model: Callable[..., Path]) -> None:
    line = [str(tiny_model("bert")), "--kind", "classifier", "--batch-size", "3"]
    found = footprint_process.measure_checkpoint(footprint_process._build_parser().parse_args(line))
    assert 0 < found["load_seconds"] < found["first_output_seconds"]
    assert 0 < found["import_bytes"] <= found["peak_bytes"]
    assert found["tokens_per_second"] == pytest.approx(64 * found["rows_per_second"])
    assert found["tokens_per_second_stderr"] > 0
    assert "decode_tokens_per_second" not in found


def test_the_prompt_leaves_room_for_new_tokens(load) -> None:
    module = load("llama").module
    assert footprint_process.make_prompt(module, 2, "cpu").shape == (2, footprint_process.PROMPT)
    module.config.max_position_embeddings = 40
    assert footprint_process.make_prompt(module, 1, "cpu").shape == (1, 8)


def test_decoding_and_encoding_count_tokens(load, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(i) for i in range(1000))
    monkeypatch.setattr(footprint_process, "read_clock", lambda device: next(clock))
    ids = torch.ones(1, 5, dtype=torch.int64)
    with torch.inference_mode():
        found = footprint_process.time_decoding(load("llama").module, ids)
        assert (found["prefill_tokens_per_second"], found["decode_tokens_per_second"]) == (5, 32)
        found = footprint_process.time_forward(load("bert").module, ids.repeat(3, 1))
        assert (found["tokens_per_second"], found["rows_per_second"]) == (15, 3)


def test_the_error_of_a_speed_is_that_of_a_median() -> None:
    """Against many medians of normal times, drawn anew."""
    generator, errors = np.random.default_rng(0), []
    times_RN = generator.normal(2.0, 0.1, size=(4000, 5))
    for times in times_RN[:500]:
        found = footprint_process.compute_rate("speed", 10, times.tolist())
        assert found["speed"] == pytest.approx(10 / np.median(times))
        errors.append(found["speed_stderr"])
    truth = (10 / np.median(times_RN, 1)).std()
    assert np.mean(errors) == pytest.approx(truth, rel=0.1)
    assert footprint_process.compute_rate("speed", 10, [2.0]) == {"speed": 5.0}


def test_a_slow_model_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    footprint_process.repeat(lambda: calls.append(1))
    assert len(calls) == 1 + footprint_process.REPEATS
    monkeypatch.setattr(footprint_process, "BUDGET_SECONDS", -1.0)
    calls.clear()
    footprint_process.repeat(lambda: calls.append(1))
    assert len(calls) == 1


def test_resident_memory_is_that_of_this_process() -> None:
    assert (
        2**20
        < footprint_process.read_resident_bytes("VmRSS")
        <= footprint_process.read_resident_bytes("VmHWM")
    )

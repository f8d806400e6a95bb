"""The Python API: the options, checks and errors of the command line, in Python's words."""

from __future__ import annotations

import inspect as signatures
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import cptq
from cptq.config import AnalyzeSettings, CompressSettings, EvalSettings, list_options
from cptq.errors import CptqError, OutputExistsError, PlanError, UsageError
from cptq.types import Notice, Plan, Progress
from tests.conftest import Heard, TinyModel

pytestmark = pytest.mark.usefixtures("same_process", "short_manual")
TEXT = {"calibration": "pydoc", "samples": 4, "seqlen": 32}


def test_importing_it_is_cheap() -> None:
    heavy = "{'torch', 'transformers'} & {*sys.modules}"
    code = f"import sys, cptq; cptq.compress; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("function", "settings"),
    [
        (cptq.analyze, AnalyzeSettings),
        (cptq.compress, CompressSettings),
        (cptq.evaluate, EvalSettings),
    ],
)
def test_every_option_is_a_keyword_with_its_help(function: object, settings: type) -> None:
    parameters = signatures.signature(function).parameters  # type: ignore[arg-type]
    for name, option in list_options(settings).items():
        if name == "dry_run":  # a function of its own: cptq.estimate
            continue
        assert name in parameters
        assert option.positional or option.help in (function.__doc__ or "")


def test_names_of_flags_and_texts_of_the_line_are_taken(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    one = cptq.plan(tiny_model("llama"), bits="4,8", target="5bit", pin=["down=8bit"], **TEXT)
    two = cptq.plan(tiny_model("llama"), bits=(4, 8), target="5bit", pins=("down=8bit",), **TEXT)
    assert one == two
    assert {choice.bits for choice in one.choices.values()} <= {4, 8}
    one.save(tmp_path / "plan.json")
    assert (
        cptq.api._build(  # the file is one that `compress` takes
            CompressSettings, {"model": "m", "plan": tmp_path / "plan.json", "out": tmp_path / "o"}
        ).plan
        == tmp_path / "plan.json"
    )


def test_one_measurement_serves_two_targets_and_a_plan_is_carried_out(
    tiny_model: TinyModel, tmp_path: Path, heard: Heard
) -> None:
    model = tiny_model("llama")
    assert not heard  # what listens is heard even while it counts as false
    analysis = cptq.analyze(model, out=tmp_path / "a", progress=heard, **TEXT)
    assert analysis.summary.sensitivity["output"].metric == "output"
    assert {Progress, Notice} == {type(event) for event in heard}
    scores = tmp_path / "a" / "sensitivity" / "output.json"
    plans = [cptq.plan(model, target=t, sensitivity=scores, **TEXT) for t in ("4bit", "6bit")]
    assert all(isinstance(plan, Plan) for plan in plans)
    assert plans[0].predicted_bytes < plans[1].predicted_bytes
    plans[0].save(tmp_path / "plan.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = cptq.compress(model, plan=tmp_path / "plan.json", out=tmp_path / "c", **TEXT)
    assert result.artifact is not None
    assert result.artifact.weight_bytes == plans[0].predicted_bytes
    assert cptq.verify(tmp_path / "c").tensors > 0
    assert cptq.inspect(tmp_path / "c").nbytes == result.artifact.weight_bytes
    exported = cptq.export(tmp_path / "c", "dense", out=tmp_path / "d")
    assert exported.bytes_before == result.artifact.weight_bytes


def test_without_progress_fallbacks_become_warnings(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="groups of"):
        cptq.compress(
            tiny_model("llama"),
            out=tmp_path / "o",
            compressor="nearest",
            allocator="uniform",
            **TEXT,
        )


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"tarjet": "4bit"}, UsageError, "target"),
        ({"target": "banana"}, CptqError, "banana"),
        ({"metric": "outptu"}, CptqError, "output"),
        ({"metric": "output", "plan": "p.json"}, UsageError, "--plan"),
        ({"plan": "absent.json"}, PlanError, "absent.json"),
        ({"bits": (4, 9)}, UsageError, "9"),
        ({"out": "."}, OutputExistsError, "--overwrite"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_looked_for(
    options: dict[str, object], error: type[CptqError], named: str
) -> None:
    with pytest.raises(error) as caught:
        cptq.compress("no/such-model", **options)
    assert named in str(caught.value)


def test_an_option_given_under_both_its_names_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        cptq.analyze("m", metric=["cca"], metrics=["output"])
    assert "metric" in str(caught.value)


def test_plan_takes_no_output() -> None:
    with pytest.raises(UsageError) as caught:
        cptq.plan("m", out="x")
    assert "out" in str(caught.value)

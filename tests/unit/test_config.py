"""Settings: ranges, strict YAML, precedence, and the line that repeats a run."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cptq.config import (
    AnalyzeSettings,
    CalibrationSettings,
    CompressSettings,
    EvalSettings,
    ExportSettings,
    ModelSettings,
    PlanSettings,
    build,
    command_line,
    describe,
    save_recipe,
    settings_from,
)
from cptq.config.options import list_fixed
from cptq.errors import OutputExistsError, UsageError

CONFIGS = Path(__file__).parents[2] / "configs"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_defaults_are_those_of_the_dataclasses() -> None:
    settings = settings_from(CompressSettings, {"model": "m"})
    assert settings == CompressSettings(
        model=ModelSettings(model="m"), calibration=CalibrationSettings()
    )


def test_line_wins_over_file_and_file_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "model: other\ntarget: 3bit\nsamples: 7\nbatch-size: 2\n")
    line = {"model": "m", "samples": 9, "seqlen": None}
    settings = settings_from(CompressSettings, line, file)
    assert settings.model.model == "m"
    assert settings.target == "3bit"
    assert (settings.calibration.samples, settings.calibration.batch_size) == (9, 2)
    assert settings.calibration.seqlen == CalibrationSettings().seqlen


def test_the_model_may_stand_in_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "model: org/name\n")
    assert settings_from(EvalSettings, {}, file).model.model == "org/name"
    with pytest.raises(UsageError) as raised:
        settings_from(EvalSettings, {})
    assert "model" in raised.value.problem


#: content of a file -> words of the problem, and of what is allowed or suggested instead
WRONG_FILES = {
    "alocator: knapsack": (["'alocator'"], ["'allocator'"]),
    "group_sise: 64": (["'group_sise'"], ["'group_size'"]),
    "zzzzzz: 1": (["'zzzzzz'"], ["model, device", "pin", "metric"]),
    "samples: many": (["samples", "'many'"], ["a whole number"]),
    "samples: 1.5": (["samples", "1.5"], ["a whole number"]),
    "samples: true": (["samples", "True"], ["a whole number"]),
    "samples:": (["samples", "None"], ["a whole number"]),
    "target: 4": (["target", "4"], ["text"]),
    "overwrite: 'yes please'": (["overwrite", "'yes please'"], ["true or false"]),
    "bits: [2, x]": (["bits", "'x'"], ["a whole number"]),
    "bits: [2, 9]": (["--bits", "9"], ["2, 3"]),
    "samples: 0": (["--samples", "0"], ["at least 1"]),
    "samples: 3\nsamples: 4": (["'samples'", "twice"], []),
    "- target": (["run.yaml"], ["target: 4bit"]),
    "": (["run.yaml"], ["target: 4bit"]),
    "target: [4bit": (["run.yaml", "cannot be read"], []),
    "target: !!python/object/apply:os.system ['true']": (["run.yaml", "cannot be read"], []),
    "dtype: bfloat17": (["--dtype", "'bfloat17'"], ["'bfloat16'"]),
    "device: gpu": (["--device", "'gpu'"], ["auto, cpu, cuda"]),
}


@pytest.mark.parametrize("text", WRONG_FILES)
def test_a_wrong_file_is_one_sentence_that_names_the_value(tmp_path: Path, text: str) -> None:
    problem, instead = WRONG_FILES[text]
    with pytest.raises(UsageError) as raised:
        settings_from(CompressSettings, {"model": "m"}, write(tmp_path, text))
    error = raised.value
    assert "\n" not in str(error)
    assert error.exit_code == 2
    for word in problem:
        assert word in error.problem
    for word in instead:
        assert word in f"{error.allowed} {error.hint}"


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.yaml", binary):
        with pytest.raises(UsageError) as raised:
            settings_from(CompressSettings, {"model": "m"}, path)
        assert str(path) in raised.value.problem


def test_lists_are_written_in_any_usual_way(tmp_path: Path) -> None:
    for text in ("bits: [4, 2, 4]", "bits: 2,4", "bits: '4, 2'"):
        settings = settings_from(CompressSettings, {"model": "m"}, write(tmp_path, text))
        assert settings.bits == (2, 4)
    assert settings_from(CompressSettings, {"model": "m", "bits": "8,4"}).bits == (4, 8)
    both = write(tmp_path, "metrics: cca, output")
    assert settings_from(AnalyzeSettings, {"model": "m"}, both).metrics == ("cca", "output")
    one = write(tmp_path, "metric: cca")
    assert settings_from(AnalyzeSettings, {"model": "m"}, one).metrics == ("cca",)


def test_a_home_directory_is_expanded_in_a_file(tmp_path: Path) -> None:
    settings = settings_from(CompressSettings, {"model": "m"}, write(tmp_path, "out: ~/x"))
    assert settings.out == Path.home() / "x"


def test_limit_is_a_share_or_a_count() -> None:
    for value in (0.1, 1.0, 20.0):
        assert settings_from(EvalSettings, {"model": "m", "limit": value}).limit == value
    for value in (0.0, -1.0, 2.5):
        with pytest.raises(UsageError) as raised:
            settings_from(EvalSettings, {"model": "m", "limit": value})
        assert "--limit" in raised.value.problem


class TestPlan:
    """A plan fixes the choices: what would be ignored beside it is refused."""

    def test_a_plan_leaves_no_target(self) -> None:
        settings = settings_from(CompressSettings, {"model": "m", "plan": "plan.json"})
        assert settings.plan == Path("plan.json")
        assert settings.target is None

    def test_refused_beside_what_it_fixes(self) -> None:
        line = {"model": "m", "plan": "plan.json", "target": "4bit", "metric": "cca"}
        with pytest.raises(UsageError) as raised:
            settings_from(CompressSettings, line)
        for flag in ("--plan", "--target", "--metric"):
            assert flag in raised.value.problem

    def test_every_option_that_it_fixes_is_refused(self) -> None:
        fixed = {option.name for option in list_fixed(CompressSettings)["plan"]}
        assert fixed == {
            *("target", "metric", "allocator", "bits", "group_size", "sparsity", "asymmetric"),
            *(
                "sparsity_profile",
                "levels",
                "scales",
                "embedding_bits",
                "sensitivity",
                "pins",
                "min_bits",
                "max_bits",
                "refine",
            ),
        }
        assert [o.name for o in list_fixed(CompressSettings)["sensitivity"]] == ["metric"]

    def test_on_the_line_wins_over_a_target_in_the_file(self, tmp_path: Path) -> None:
        file = write(tmp_path, "target: 3bit\nsamples: 5\n")
        settings = settings_from(CompressSettings, {"model": "m", "plan": "p.json"}, file)
        assert (settings.target, settings.calibration.samples) == (None, 5)

    def test_in_the_file_yields_to_a_target_on_the_line(self, tmp_path: Path) -> None:
        file = write(tmp_path, "plan: p.json\n")
        settings = settings_from(CompressSettings, {"model": "m", "target": "3bit"}, file)
        assert (settings.plan, settings.target) == (None, "3bit")


def test_the_token_is_nowhere_in_what_is_shown() -> None:
    settings = settings_from(CompressSettings, {"model": "m", "token": "hf_secret"})
    assert settings.model.token == "hf_secret"
    shown = f"{settings!r} {describe(settings)} {command_line(settings)}"
    assert "hf_secret" not in shown


def test_command_line_repeats_the_settings(tmp_path: Path) -> None:
    values = {
        "model": "a dir/m",
        "target": "3.5bpw",
        "bits": (3, 4),
        "samples": 3,
        "trust_remote_code": True,
        "out": tmp_path / "x y",
    }
    line = command_line(build(CompressSettings, values))
    assert shlex.split(line)[:3] == ["cptq", "compress", "a dir/m"]
    assert "--trust-remote-code" in line
    assert "--bits 3,4" in line
    assert "--seqlen" not in line


def test_command_line_repeats_repeatable_options() -> None:
    line = command_line(build(EvalSettings, {"model": "m", "tasks": ("wikitext", "glue/sst2")}))
    assert line == "cptq eval m --task wikitext --task glue/sst2"


def test_command_line_spells_lists_switches_and_required_options() -> None:
    values = {"model": "m", "pins": ("a=8bit", "b=4bit"), "check_uniform": False}
    line = command_line(build(CompressSettings, values))
    assert line == "cptq compress m --pin a=8bit --pin b=4bit --no-check-uniform"
    exported = ExportSettings(artifact=Path("a"), format="gguf", token="hf_secret")
    assert command_line(exported) == "cptq export a --format gguf"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_loads_and_says_what_it_is_for(path: Path) -> None:
    settings = settings_from(CompressSettings, {"model": "m"}, path)
    assert settings.target
    head = path.read_text(encoding="utf-8").split("\ntarget:")[0]
    assert f"cptq compress MODEL --config {path.name}" in head
    assert "Measured" in head


def test_there_is_a_preset_for_every_purpose() -> None:
    purposes = {"smallest-good", "quality", "vllm", "llamacpp", "encoder", "sparse"}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == purposes


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (CompressSettings, {"model": "m", "pins": ("a=8", "b=4"), "sparsity": ("2:4",)}),
        (CompressSettings, {"model": "m", "runtime": "cptq", "sparsity": ("2:4", "50%")}),
        (CompressSettings, {"model": "m", "plan": Path("p.json"), "target": None}),
        (CompressSettings, {"model": "m", "sensitivity": Path("s.json"), "target": "25%"}),
        (EvalSettings, {"model": "m", "tasks": ("wikitext", "glue/sst2"), "limit": 0.5}),
        (PlanSettings, {"model": "m", "targets": ("3bit", "4bit"), "edits": ("a=4",)}),
    ],
)
def test_a_saved_recipe_gives_the_same_settings(
    kind: Any, values: dict[str, Any], tmp_path: Path
) -> None:
    if values.get("sparsity") == ("2:4",):
        values = {**values, "runtime": "cptq"}
    settings = build(kind, values)
    save_recipe(settings, tmp_path / "run.yaml")
    assert settings_from(kind, {}, tmp_path / "run.yaml") == settings
    with pytest.raises(OutputExistsError):
        save_recipe(settings, tmp_path / "run.yaml")


def test_a_recipe_holds_no_token(tmp_path: Path) -> None:
    save_recipe(build(CompressSettings, {"model": "m", "token": "hf_x"}), tmp_path / "run.yaml")
    assert "hf_x" not in (tmp_path / "run.yaml").read_text()


def test_settings_import_no_torch() -> None:
    code = "import sys, cptq.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_option_under_both_its_names_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("metric: cca\nmetrics: output\n")
    with pytest.raises(UsageError) as caught:
        settings_from(AnalyzeSettings, {"model": "m"}, file)
    assert "'metric' and 'metrics'" in caught.value.problem

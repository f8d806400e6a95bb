"""The shape of the repository: what the linters do not check, and what the README promises."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

from cptq.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "cptq").rglob("*.py"))
SCRIPTS = sorted(
    path for path in (ROOT / "scripts").iterdir() if path.is_file() and path.name[0] != "_"
)
SHELL_SCRIPTS = [path for path in SCRIPTS if path.suffix != ".py"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND_LINE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
DOCUMENTS = "".join(
    path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
)
COMMANDS = (
    *("analyze", "plan", "compress", "eval", "compare", "bench", "generate"),
    *("export", "inspect", "verify", "soup", "doctor", "methods"),
)
MOST_LINES = 500
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _calls(tree: ast.AST, function: str) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == function
    ]


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_a_module_keeps_to_the_house_rules(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    assert len(source.splitlines()) < MOST_LINES, "a file holds one idea: split it"
    assert path.name not in {"utils.py", "util.py", "helpers.py", "common.py"}
    assert ast.get_docstring(tree) or not source.strip(), "the head of a file says what it is"
    assert not [node.lineno for node in handlers if node.type is None], "no bare except"
    if "cli" not in path.parts:
        assert not _calls(tree, "print"), "only the command line prints; emit an event"


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / ".ci" / "run"], ids=_name)
def test_a_script_is_executable_and_says_what_it_does(path: Path) -> None:
    assert os.access(path, os.X_OK)
    source = path.read_text(encoding="utf-8")
    assert source.startswith("#!/usr/bin/env ")
    if path.suffix == ".py":
        assert ast.get_docstring(ast.parse(source))
    else:
        assert source.splitlines()[1].startswith(f"# Usage: {_name(path)}")


@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=_name)
def test_a_shell_script_answers_help_at_once(path: Path, tmp_path: Path) -> None:
    environment = os.environ | {"CPTQ_VENV": str(tmp_path / "venv")}
    answer = subprocess.run(
        [path, "--help"], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=20
    )
    assert answer.returncode == 0
    assert answer.stdout.startswith(f"Usage: {_name(path)}")
    assert not (tmp_path / "venv").exists()


def test_every_script_is_mentioned_in_a_document_or_by_another() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in SCRIPTS}
    for path in SCRIPTS:
        others = [DOCUMENTS, *(text for other, text in texts.items() if other != path)]
        assert any(_name(path) in text for text in others), _name(path)


def test_the_documents_name_no_script_or_document_that_is_not_there() -> None:
    named = set(
        re.findall(r"(?:scripts/[\w-]+(?:\.py)?|\.ci/run|docs/[\w-]+\.md|LICENSE)", DOCUMENTS)
    )
    assert "scripts/demo" in README
    assert "scripts/test" in README
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@cache
def _help(*arguments: str) -> str:
    plain = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    answer = CliRunner().invoke(app, [*arguments, "--help"], env=plain)
    assert answer.exit_code == 0, answer.output
    return answer.output


def test_the_documents_name_every_command_and_no_command_or_option_that_is_not_there() -> None:
    blocks = "".join(re.findall(r"^```.*?^```", DOCUMENTS, flags=re.MULTILINE | re.DOTALL))
    typed = re.findall(r"^(?:\$ )?cptq +([a-z]+)", blocks, flags=re.MULTILINE)
    assert {*typed, *re.findall(r"`cptq ([a-z]+)", DOCUMENTS)} == set(COMMANDS)
    known = set(OPTION.findall("".join(_help(name) for name in COMMANDS)))
    scripts = set(OPTION.findall("".join(path.read_text(encoding="utf-8") for path in SCRIPTS)))
    others = {"--version", "--help", "--install-completion", "--show-completion"}
    others |= {"--chunks"}  # of llama-imatrix
    others |= {"--nproc-per-node", "--multi", "--num", "--cpu"}  # of launchers, as far as the _
    assert set(OPTION.findall(README)) - others <= known
    assert set(OPTION.findall(DOCUMENTS)) - others - scripts <= known


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_is_documented_whole(command: str) -> None:
    assert set(OPTION.findall(_help(command))) - {"--help"} <= set(OPTION.findall(COMMAND_LINE))


def test_every_direct_dependency_is_pinned_within_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [Requirement(text) for text in project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        wanted += [Requirement(text) for text in extra]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert sorted(versions) == sorted(canonicalize_name(item.name) for item in wanted)
    for item in wanted:
        version = versions[canonicalize_name(item.name)]
        assert item.specifier.contains(version, prereleases=True), f"{item} and {version}"

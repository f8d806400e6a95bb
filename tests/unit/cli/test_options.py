"""Options are written once, in the settings' fields: signatures, help and YAML keys follow them."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cptq.cli.app import app
from cptq.cli.commands import COMMANDS, Command
from cptq.cli.parameters import ConfiguredPresentation
from cptq.config import Option, list_options, read_file, settings_from
from cptq.config.options import SECTIONS
from cptq.errors import UsageError
from tests.unit.cli.conftest import Cptq

EVERY_COMMAND = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
CONFIGURED = [c for c in COMMANDS if issubclass(c.presentation, ConfiguredPresentation)]
OPTIONS = [
    pytest.param(command, option, id=f"{command.name}-{option.name}")
    for command in COMMANDS
    for option in command.options
]
SAMPLES: dict[Any, tuple[str, Any]] = {
    int: ("3", 3),
    float: ("0.5", 0.5),
    bool: ("true", True),
    str: ("'a'", "a"),
    Path: ("a", Path("a")),
}


def normalize(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """The help of every command at 80 columns."""
    runner = CliRunner(env={"COLUMNS": "80"})
    return {c.name: runner.invoke(app, [c.name, "--help"]).stdout for c in COMMANDS}


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_every_field_is_in_the_help_with_its_text(
    helps: dict[str, str], command: Command, option: Option
) -> None:
    shown = normalize(helps[command.name])
    entry = f"{option.metavar} {option.describe()}" if option.metavar else option.describe()
    assert normalize(entry) in shown
    if not option.positional:
        for flag in option.flags:
            assert re.search(rf"(^|[ ,]){flag}[ ,]", shown), flag
    assert f"\n{option.section}:\n" in helps[command.name]


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_a_help_text_is_sentences_with_the_default(command: Command, option: Option) -> None:
    assert re.match(r"[A-Z].*\.$", option.help)
    default = option.describe_default()
    plain = isinstance(option.default, int | float | str) and option.default is not False
    assert default is not None or not plain
    assert f"Default: {default}." in option.describe() or default is None


@EVERY_COMMAND
def test_there_is_no_parameter_without_a_field(command: Command) -> None:
    (registered,) = [c for c in app.registered_commands if c.name == command.name]
    assert registered.callback is not None
    found = inspect.signature(registered.callback).parameters
    fields = {**list_options(command.settings), **list_options(command.presentation)}
    assert set(found) == set(fields)
    for name, parameter in found.items():
        (info,) = parameter.annotation.__metadata__
        spelled = [info.default, *(info.param_decls or ())]  # Typer keeps the first as a default
        given = {flag for words in spelled if isinstance(words, str) for flag in words.split("/")}
        if not fields[name].positional:
            assert set(command.flags.get(name, fields[name].flags)) <= given


@EVERY_COMMAND
def test_the_help_names_no_flag_without_a_field(helps: dict[str, str], command: Command) -> None:
    flags = {flag for option in command.options for flag in option.flags if not option.positional}
    flags |= {flag.replace("--", "--no-", 1) for flag in flags}
    names = re.findall(r"^  (-.*?)(?:  |$)", helps[command.name], flags=re.MULTILINE)
    named = {flag for name in names for flag in re.findall(r"--?[a-z][a-z-]*", name)}
    assert named <= flags


@EVERY_COMMAND
def test_the_help_has_its_sections_in_order_and_fits(
    helps: dict[str, str], command: Command
) -> None:
    lines = helps[command.name].splitlines()
    assert max(map(len, lines)) <= 80
    shown = [line[:-1] for line in lines if re.fullmatch(r"[A-Z]\w+:", line)]
    assert shown == [section for section in SECTIONS if section in shown]
    assert {option.section for option in command.options} == set(shown)


@pytest.mark.parametrize("command", CONFIGURED, ids=lambda command: command.name)
def test_every_field_has_its_key_in_a_file(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for name, option in list_options(command.settings).items():
        text, value = SAMPLES[option.value_type]
        for key in {option.key, option.key.replace("_", "-"), name}:
            file.write_text(f"{key}: {text}\n")
            assert read_file(command.settings, file) == {name: (value,) if option.plural else value}


@pytest.mark.parametrize("command", CONFIGURED, ids=lambda command: command.name)
def test_a_file_takes_no_option_of_the_command_line_alone(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for name in list_options(command.presentation):
        file.write_text(f"{name}: x\n")
        with pytest.raises(UsageError) as raised:
            settings_from(command.settings, {"model": "m"}, file)
        assert name in raised.value.problem


def test_names_of_registries_are_listed(helps: dict[str, str]) -> None:
    for command in COMMANDS:
        for option in command.options:
            if option.registry:
                names = ", ".join(option.load_registry().list_names())
                assert names in normalize(helps[command.name])


def test_the_exit_codes_are_documented(cptq: Cptq) -> None:
    shown = cptq("--help").stdout
    for code in (0, 1, 2, 70, 130):
        assert re.search(rf"^ +{code} +\w", shown, flags=re.MULTILINE), code
    assert max(map(len, shown.splitlines())) <= 80

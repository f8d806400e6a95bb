"""Strict YAML for `--config`, and how it joins the command line.

The line wins over the file, the file over the defaults. Keys are the options' names (`group-size`
or `group_size`); an unknown key is an error that names the nearest one, so is a key given twice.
A relative path counts from the current directory, as on the line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from cptq.config.checks import SINGULAR, option
from cptq.config.settings import FIXED_BY
from cptq.config.values import build, convert, flat_fields
from cptq.errors import UsageError
from cptq.registry import find_closest

S = TypeVar("S")


def settings_from(kind: type[S], line: Mapping[str, Any], file: Path | None = None) -> S:
    """Settings from the options given on the line (None = not given) over those of a YAML file.

    Raises:
        UsageError: an unknown or doubled key, a value of a wrong type or out of its range, or
            options beside a plan that the plan already fixes.
    """
    given = {name: value for name, value in line.items() if value is not None}
    known = {
        name: convert(option(name), flat_fields(kind)[name], value) for name, value in given.items()
    }
    return build(kind, _merge(known, read_file(kind, file) if file else {}))


def _merge(line: dict[str, Any], file: dict[str, Any]) -> dict[str, Any]:
    for source in (line, file):
        _check_doubled(source)
    for fixing, fixed in FIXED_BY.items():
        if fixing in line:
            file = {name: value for name, value in file.items() if name not in fixed}
        elif any(name in line for name in fixed):
            file = {name: value for name, value in file.items() if name != fixing}
    merged = {**file, **line}
    return {**merged, "target": None} if "plan" in merged else merged


_SAYS = {
    "plan": "a plan already says what every layer gets",
    "sensitivity": "the file of --sensitivity already says the metric",
}


def _check_doubled(values: Mapping[str, Any]) -> None:
    for fixing, fixed in FIXED_BY.items():
        doubled = " and ".join(option(name) for name in fixed if name in values)
        if fixing in values and doubled:
            raise UsageError(
                f"{_SAYS[fixing]}, so {doubled} would be ignored",
                hint=f"leave out {doubled}, or {option(fixing)}",
            )


def read_file(kind: type, path: Path) -> dict[str, Any]:
    """The settings that a YAML file gives, by field name, each of its field's type.

    Raises:
        UsageError: the file cannot be read, is no mapping, or has an unknown key or a value of a
            wrong type; the message names the file, the key and the nearest known one.
    """
    from cptq.config.strict import load_mapping  # YAML is for those who give a file

    known = flat_fields(kind)
    spelled = {SINGULAR.get(name, name): name for name in known} | {name: name for name in known}
    values: dict[str, Any] = {}
    for key, value in load_mapping(path).items():
        name = spelled.get(str(key).replace("-", "_"))
        if name is None:
            near = find_closest(str(key), list(spelled))
            raise UsageError(
                f"{path}: unknown key {str(key)!r}",
                allowed=", ".join(SINGULAR.get(name, name) for name in known),
                hint=f"did you mean {near!r}?" if near else None,
            )
        values[name] = convert(f"{path}: {key}", known[name], value)
    return values

"""Strict YAML for `--config`, and how it joins the command line.

The line wins over the file, the file over the defaults. Keys are the options' names (`group-size`
or `group_size`); an unknown key is an error that names the nearest one, so is a key given twice.
A relative path counts from the current directory, as on the line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cptq.config.settings import FIXED_BY_PLAN, SINGULAR, option
from cptq.config.values import build, convert, flat_fields
from cptq.errors import UsageError
from cptq.registry import closest

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
        _check_plan(source)
    if "plan" in line:
        file = {name: value for name, value in file.items() if name not in FIXED_BY_PLAN}
    elif any(name in line for name in FIXED_BY_PLAN):
        file = {name: value for name, value in file.items() if name != "plan"}
    merged = {**file, **line}
    return {**merged, "target": None} if "plan" in merged else merged


def _check_plan(values: Mapping[str, Any]) -> None:
    doubled = [option(name) for name in FIXED_BY_PLAN if name in values]
    if "plan" in values and doubled:
        raise UsageError(
            f"a plan already says what every layer gets, so {' and '.join(doubled)} would be "
            "ignored",
            hint=f"leave out {' and '.join(doubled)}, or --plan",
        )


class _Loader(yaml.SafeLoader):
    """YAML's safe loader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        doubled = [str(key) for index, key in enumerate(keys) if key in keys[:index]]
        if doubled:
            raise UsageError(f"{node.start_mark.name}: {doubled[0]!r} is given twice")
        return super().construct_mapping(node, deep=deep)


def read_file(kind: type, path: Path) -> dict[str, Any]:
    """The settings that a YAML file gives, by field name, each of its field's type.

    Raises:
        UsageError: the file cannot be read, is no mapping, or has an unknown key or a value of a
            wrong type; the message names the file, the key and the nearest known one.
    """
    known = flat_fields(kind)
    spelled = {SINGULAR.get(name, name): name for name in known} | {name: name for name in known}
    values: dict[str, Any] = {}
    for key, value in _mapping(path).items():
        name = spelled.get(str(key).replace("-", "_"))
        if name is None:
            near = closest(str(key), list(spelled))
            raise UsageError(
                f"{path}: unknown key {str(key)!r}",
                allowed=", ".join(SINGULAR.get(name, name) for name in known),
                hint=f"did you mean {near!r}?" if near else None,
            )
        values[name] = convert(f"{path}: {key}", known[name], value)
    return values


def _mapping(path: Path) -> dict[Any, Any]:
    try:
        with path.open(encoding="utf-8") as stream:
            data = yaml.load(stream, Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"the config file {path} cannot be read: {reason}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds no settings", allowed="lines such as `target: 4bit`")
    return data

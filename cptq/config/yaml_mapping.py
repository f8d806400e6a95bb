"""A YAML file as a mapping: plain data only, no key twice, every failure in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cptq.errors import UsageError


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        doubled = [str(key) for index, key in enumerate(keys) if key in keys[:index]]
        if doubled:
            raise UsageError(
                f"{node.start_mark.name}: {doubled[0]!r} is given twice", hint="remove one of them"
            )
        return super().construct_mapping(node, deep=deep)


def load_mapping(path: Path) -> dict[Any, Any]:
    """Return what a YAML file holds.

    Raises:
        UsageError: it cannot be read, is not YAML, holds a key twice, or is not a mapping.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            data = yaml.load(stream, Loader=_Loader)  # a SafeLoader: plain data only
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        message = getattr(error, "strerror", None) or str(error)
        reason = " ".join(message.split())
        raise UsageError(f"the config file {path} cannot be read: {reason}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds no settings", allowed="lines such as `target: 4bit`")
    return data

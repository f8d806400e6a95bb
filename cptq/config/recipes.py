"""A run as a YAML file, which `--config` reads and `--save-config` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cptq.config.options import list_fixed, list_options
from cptq.config.settings import COMMANDS, AnySettings
from cptq.config.values import describe
from cptq.errors import OutputExistsError, UsageError

#: what a repeated run must be asked for anew: to replace its output, or to go on with it
ONCE = ("overwrite", "resume")


def list_values(settings: AnySettings) -> dict[str, Any]:
    """Return {key: value} of all options that have one, without the access token.

    What another given option determines is left out: with a plan its target.
    """
    kind = type(settings)
    options, given = list_options(kind), describe(settings)
    fixed = {
        other.name
        for fixing, others in list_fixed(kind).items()
        if given.get(fixing) is not None
        for other in others
    }
    return {
        options[name].key: value
        for name, value in given.items()
        if value not in (None, []) and name not in fixed and name not in ONCE
    }


def save_recipe(settings: AnySettings, path: Path) -> None:
    """Write the settings of a run as YAML.

    Raises:
        OutputExistsError: the file is there already.
        UsageError: it cannot be written.
    """
    import yaml  # which only files need

    if path.exists():
        raise OutputExistsError(f"{path} already exists", hint="choose another --save-config")
    command = COMMANDS[type(settings)]
    text = f"# cptq {command} --config {path}\n" + yaml.safe_dump(
        list_values(settings), sort_keys=False, allow_unicode=True
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror}", hint="choose another --save-config"
        ) from error

"""The one way in which every command runs: settings, early checks, pipeline, output.

What `--help` does not need is imported when a command runs; torch comes with the pipeline, after
all that can be refused without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cptq.cli.console import Talk
    from cptq.cli.show import Outcome
    from cptq.config import Settings

#: command -> its function in cptq.pipeline
FUNCTIONS = {
    "analyze": "analyze",
    "compress": "compress",
    "eval": "evaluate",
    "compare": "compare",
}


def run(command: str, kind: type[Settings], params: Mapping[str, Any]) -> None:
    """Run a command with the parameters that were given (None or empty: not given).

    Raises:
        typer.Exit: with the exit code of a failure, which has been told.
    """
    from cptq.cli.console import Talk
    from cptq.cli.failures import guarded
    from cptq.cli.show import show
    from cptq.cli.validate import checked
    from cptq.config import settings_from

    line = {name: value for name, value in params.items() if value not in (None, [], ())}
    talk = Talk(line.pop("shape", "human"))
    with guarded(talk):
        file = line.pop("config", None)
        settings = checked(settings_from(kind, line, file=file))
        outcome = _pipeline(command, settings, talk)
        talk.close()
        show(talk, outcome)


def _pipeline(command: str, settings: Settings, talk: Talk) -> Outcome:
    function = getattr(import_module("cptq.pipeline"), FUNCTIONS[command])
    outcome: Outcome = function(settings, talk.emit)
    return outcome

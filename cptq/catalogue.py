"""`cptq methods`: metrics, compressors, allocators, activation rules, formats, runtimes and tasks.

The facts stand beside the entries of the registries, so that one is not changed without the other.
Nothing is imported but the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cptq.activation_sparsity import METHODS as ACTIVATION_METHODS
from cptq.allocation import ALLOCATORS
from cptq.artifact.formats import FORMATS
from cptq.compression import COMPRESSORS
from cptq.config import RUNTIMES, MethodsSettings
from cptq.errors import UsageError
from cptq.evaluation import TASKS
from cptq.registry import Facts, Registry, find_closest
from cptq.report.methods import Method, MethodsOutcome
from cptq.sensitivity import METRICS

#: of a name that was registered without facts
UNKNOWN = Facts(does="-")
#: kind -> (how it is chosen, its registry)
_REGISTRIES: Mapping[str, tuple[str, Registry[Any]]] = {
    "metric": ("--metric", METRICS),
    "allocator": ("--allocator", ALLOCATORS),
    "compressor": ("--compressor", COMPRESSORS),
    "activation-rule": ("--activation-sparsity", ACTIVATION_METHODS),
    "format": ("cptq export --format", FORMATS),
    "task": ("--task", TASKS),
}


def list_methods(settings: MethodsSettings) -> MethodsOutcome:
    """Return the methods that the settings name by kind or by name; all of them without.

    Raises:
        UsageError: a word is neither a kind nor a name.
    """
    known = [*_list_registered(), *_list_runtimes()]
    if not settings.names:
        return MethodsOutcome(methods=tuple(known))
    plural = {f"{method.kind}s": method.kind for method in known}
    given = [plural.get(word, word) for word in settings.names]
    names = {method.name for method in known} | {method.kind for method in known}
    for word in given:
        if word not in names:
            near = find_closest(word, sorted(names))
            kinds = ", ".join(dict.fromkeys(method.kind for method in known))
            raise UsageError(
                f"there is no method {word!r}",
                allowed=f"{kinds}, or one of their names",
                hint=f"did you mean {near!r}?" if near else "cptq methods lists all",
            )
    return MethodsOutcome(methods=tuple(m for m in known if m.kind in given or m.name in given))


def _list_registered() -> list[Method]:
    return [
        Method(kind=kind, option=option, name=name, facts=registry.find_facts(name) or UNKNOWN)
        for kind, (option, registry) in _REGISTRIES.items()
        for name in registry
    ]


def _list_runtimes() -> list[Method]:
    return [
        Method(kind="runtime", option="--runtime", name=name, facts=known.facts or UNKNOWN)
        for name, known in RUNTIMES.items()
    ]

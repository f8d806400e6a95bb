"""Check a packed model before any memory is allocated: its config.json and its file headers.

The schemes in config.json are compared with the shapes of the model, and every tensor of the files
with the shape and type that docs/format-packed.md specifies. Only headers are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from cptq.errors import ArtifactError
from cptq.inference.operations import PackedWeight
from cptq.layouts.activations import list_rule_tensors, parse_rule
from cptq.layouts.packed import (
    READABLE,
    RULES_VERSION,
    count_pattern_bits,
    count_stored,
    explain_misfit,
    list_packed_tensors,
)
from cptq.numerics.packing import unpack_values
from cptq.numerics.sparse import list_patterns
from cptq.types import Candidate

_AGAIN = "download or copy the artifact again"
#: types of scales of 16 bits and more
FLOATS = ("F32", "F16", "BF16", "F64")
#: type and shape of a tensor
Header = tuple[str, tuple[int, ...]]


def read_modules(modules: Any, version: Any) -> Mapping[str, str]:
    """Validate the table {module: label} of config.json.

    Raises:
        ArtifactError: another format version, or not a table of schemes.
    """
    if version not in READABLE:
        raise ArtifactError(
            f"the artifact has version {version!r} of the packed format",
            allowed=f"version {', '.join(map(str, READABLE[:-1]))} or {READABLE[-1]}",
            hint="install the version of cptq that wrote it",
        )
    if not isinstance(modules, Mapping) or not modules:
        raise ArtifactError("config.json has no table of packed modules", hint=_AGAIN)
    for name, label in modules.items():
        try:
            known = Candidate.parse(label)
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"config.json packs {name!r} as {label!r}: {error}") from error
        if known.dense or known.label != label:
            raise ArtifactError(f"config.json packs {name!r} as {label!r}, which is not a scheme")
    return modules


def read_rules(activations: Any, modules: Mapping[str, str], version: int) -> Mapping[str, str]:
    """Validate the table {module: label} of the rules of activation sparsity in config.json.

    Raises:
        ArtifactError: a version without rules, not a table of labels, or a module that is not
            packed.
    """
    if activations is None:
        return {}
    rules = activations.get("rules") if isinstance(activations, Mapping) else None
    if version < RULES_VERSION or not isinstance(rules, Mapping):
        raise ArtifactError("config.json has no table of the rules of activation sparsity")
    for name, label in rules.items():
        try:
            parse_rule(label)
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"config.json has a rule of {name!r}: {error}") from error
        if name not in modules:
            raise ArtifactError(f"config.json has a rule of {name!r}, which is not packed")
    return rules


def check_header(
    files: Iterable[Path],
    modules: Mapping[str, tuple[tuple[int, int], Candidate]],
    model: nn.Module,
    rules: Mapping[str, str],
) -> None:
    """Compare the tensors of the weight files with those that the modules need.

    Args:
        files: the weight files; without any (for a state dict) only the schemes are checked.
        modules: {name: (shape, scheme)}.
        model: names in the files may have or lack its prefix.
        rules: {name: label of the rule of activation sparsity}.

    Raises:
        ArtifactError: names the first tensor that does not fit, with the reason.
    """
    for name, (shape, scheme) in modules.items():
        why = explain_misfit(shape, scheme)
        if why is not None:
            raise ArtifactError(f"config.json packs {name!r} as {scheme.label}: {why}")
    found = read_headers(files)
    if not found:
        return
    prefix = f"{model.base_model_prefix}."
    for name, (shape, scheme) in modules.items():
        ruled = list_rule_tensors(name, shape, rules.get(name, ""))
        for spec in (*list_packed_tensors(name, shape, "F32", scheme), *ruled):
            names = (spec.name, spec.name.removeprefix(prefix), prefix + spec.name)
            known = next((found[other] for other in names if other in found), None)
            allowed = (spec.dtype,) if spec.dtype == "I32" else FLOATS
            require_tensor(spec.name, known, allowed, spec.shape, scheme)


def require_tensor(
    name: str,
    found: Header | None,
    types: tuple[str, ...],
    shape: tuple[int, ...],
    scheme: Candidate,
) -> None:
    """Compare what the header of a file says of a tensor with what a scheme needs.

    Raises:
        ArtifactError: the tensor is missing (`found` is None), or has another type or shape.
    """
    if found is None or found[1] != shape or found[0] not in types:
        found_as = "missing" if found is None else f"{found[0]} {list(found[1])}"
        raise ArtifactError(
            f"{name} is {found_as} in the weight file; {scheme.label} needs "
            f"{' or '.join(types)} {list(shape)}",
            hint=_AGAIN,
        )


def check_positions(name: str, weight: PackedWeight) -> None:
    """Check, after loading, that a mask or pattern agrees with the number of stored codes.

    Raises:
        ArtifactError: it does not.
    """
    inputs, stored, wrong = weight.shape[1], 0, False
    if weight.mask is not None and not weight.mask.is_meta:
        stored = int(unpack_values(weight.mask, 1, inputs).sum())
        wrong = stored != count_stored(weight.shape, weight.scheme)
    kept_of = weight.scheme.kept_of
    if weight.pattern is not None and kept_of is not None and not weight.pattern.is_meta:
        bits, blocks = count_pattern_bits(*kept_of), inputs // kept_of[1]
        largest = int(unpack_values(weight.pattern, bits, blocks).max())
        wrong = largest >= len(list_patterns(*kept_of))
    if wrong:
        raise ArtifactError(
            f"the positions of the stored weights of {name} do not match {weight.scheme.label}",
            hint=_AGAIN,
        )


def read_headers(files: Iterable[Path]) -> dict[str, Header]:
    """Return {tensor: (type, shape)} of all files."""
    found: dict[str, Header] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    part = opened.get_slice(name)
                    found[name] = part.get_dtype(), tuple(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{file} cannot be read: {error}", hint=_AGAIN) from error
    return found

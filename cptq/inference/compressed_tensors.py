"""Which modules of a compressed-tensors checkpoint can stay packed, by names and headers alone.

compressed-tensors (0.18 and later) packs codes as cptq does (`cptq.numerics.packing`), so that the
words of a `pack-quantized` linear are those of a `PackedLinear`:

| tensor          | type          | shape                  | becomes                               |
|-----------------|---------------|------------------------|---------------------------------------|
| X.weight_packed | int32         | (out, words(in, bits)) | X.weight, the same words              |
| X.weight_scale  | float; 8-bit  | (out, groups)          | X.weight_scale in the model's type,   |
|                 | float         |                        | which holds 8-bit floats exactly      |
| X.weight_shape  | integers      | (2,)                   | compared with the module, not kept    |
| Y.weight        | F8_E4M3, F8_E5M2 | (out, in)           | bytes of a `Float8Module`             |

config.json names modules by `targets`: an exact name, `re:` and a regular expression, or a class;
the first of these that matches decides, as in the library. Which tensors the file has decides
whether a module is packed at all. What is refused here (`UnsupportedError`) is well formed but
computed by stock transformers alone; what is damaged is an `ArtifactError`.

The format is described in docs/runtimes-and-formats.md; that of `quantization_config` in
https://github.com/vllm-project/compressed-tensors (`QuantizationConfig`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from cptq.errors import ArtifactError
from cptq.inference.checks import FLOATS, Header, read_headers, require_tensor
from cptq.inference.float8 import STORED
from cptq.layouts.packed import count_words
from cptq.types import Candidate

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
_TENSORS = (PACKED, SCALE, SHAPE)
#: tensors of layers that are stored in other ways, and what they stand for
_FOREIGN = {
    "weight_zero_point": "asymmetric grids",
    "weight_g_idx": "inputs in another order (g_idx)",
    "weight_global_scale": "scales of two levels",
    "input_scale": "quantized activations",
    "k_scale": "a quantized cache",
    "v_scale": "a quantized cache",
}


class UnsupportedError(Exception):
    """The checkpoint has something that only stock transformers computes; says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One entry of `config_groups`: names or patterns, and the scheme of what they match."""

    targets: tuple[str, ...]
    scheme: Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedPlan:
    """What stays packed in a model.

    Attributes:
        linears: {name: scheme} of the linears to pack.
        scales: {name: type of its scales in the file}.
        float8: {name: "e4m3" or "e5m2"} of the embeddings and linears of 8-bit floats.
    """

    linears: Mapping[str, Candidate]
    scales: Mapping[str, str]
    float8: Mapping[str, str]


def read_groups(config: Mapping[str, Any]) -> tuple[Group, ...]:
    """Read the `quantization_config` of config.json.

    Raises:
        UnsupportedError: it has something other than symmetric packed integers.
    """
    try:
        _refuse_extras(config)
        return tuple(_read_group(group, config) for group in config["config_groups"].values())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnsupportedError(f"its quantization_config has another form ({error!r})") from error


def _refuse_extras(config: Mapping[str, Any]) -> None:
    if config.get("quantization_status", "compressed") != "compressed":
        raise UnsupportedError(f"its status is {config['quantization_status']!r}")
    for field, meaning in (
        ("kv_cache_scheme", "a quantized cache"),
        ("sparsity_config", "sparse weights"),
        ("transform_config", "transformed weights"),
    ):
        content = config.get(field)
        if content and content != {"format": "dense"}:
            raise UnsupportedError(f"it has {meaning}")


def _read_group(group: Mapping[str, Any], config: Mapping[str, Any]) -> Group:
    form = group.get("format") or config.get("format")
    if form != FORMAT:
        raise UnsupportedError(f"its format is {form!r}, not {FORMAT!r}")
    if group.get("input_activations") or group.get("output_activations"):
        raise UnsupportedError("it has quantized activations")
    weights = group["weights"]
    bits, kind, strategy = int(weights["num_bits"]), weights.get("type", "int"), weights["strategy"]
    if kind != "int" or not 2 <= bits <= 8:
        raise UnsupportedError(f"it has weights of the type {kind} with {bits} bits")
    if not weights.get("symmetric", True):
        raise UnsupportedError("it has asymmetric grids")
    if strategy not in ("group", "channel"):
        raise UnsupportedError(f"its scales have the strategy {strategy!r}")
    if weights.get("dynamic") or weights.get("actorder") in ("group", "dynamic", True):
        raise UnsupportedError("it has dynamic scales or inputs in another order")
    size = int(weights["group_size"]) if strategy == "group" else 0
    targets = tuple(map(str, group["targets"]))
    return Group(targets=targets, scheme=Candidate(bits=bits, group_size=size))


def plan_packing(model: nn.Module, files: Sequence[Path], groups: Sequence[Group]) -> PackedPlan:
    """Find out from the headers of the weight files what stays packed, and check shapes and types.

    Raises:
        UnsupportedError: something that only stock transformers computes.
        ArtifactError: a tensor is missing, or has a type or shape that does not fit.
    """
    found = read_headers(files)
    _refuse_foreign(found)
    modules = dict(model.named_modules())
    named = {target for group in groups for target in group.targets if target in modules}
    stored = {name.rpartition(".")[0] for name in found if name.endswith(f".{PACKED}")}
    shapes = _read_shapes(files)
    linears: dict[str, Candidate] = {}
    for name in sorted(named | stored):
        module = modules.get(name)
        if type(module) is not nn.Linear:
            raise UnsupportedError(f"it packs {name}, which is no linear layer of its own")
        if f"{name}.weight" in model.all_tied_weights_keys:  # type: ignore[operator]
            raise UnsupportedError(f"it packs {name}, which is tied to another layer")
        linears[name] = _check_linear(name, module, _find_scheme(name, groups), found, shapes)
    return PackedPlan(
        linears=linears,
        scales={name: found[f"{name}.{SCALE}"][0] for name in linears},
        float8=_find_float8(model, found),
    )


def _refuse_foreign(found: Mapping[str, Header]) -> None:
    for name in found:
        part = name.rpartition(".")[2]
        if part in _FOREIGN:
            raise UnsupportedError(f"it has {_FOREIGN[part]}")


def _find_scheme(name: str, groups: Sequence[Group]) -> Candidate:
    """Return the scheme of a linear: that of its name, of a pattern, or of the class."""
    targets = {target: group.scheme for group in groups for target in group.targets}
    patterns = sorted(target for target in targets if target.startswith("re:"))
    matches = [target for target in patterns if re.match(target[3:], name)]
    for target in (name, *matches, "Linear"):
        if target in targets:
            return targets[target]
    raise ArtifactError(
        f"the weight file packs {name}, for which config.json has no config group",
        hint="download or copy the artifact again",
    )


def _check_linear(
    name: str,
    module: nn.Linear,
    scheme: Candidate,
    found: Mapping[str, Header],
    shapes: Mapping[str, tuple[int, ...]],
) -> Candidate:
    """Compare the tensors of a linear with its shape; return its scheme as the modules have it."""
    out, inputs = module.out_features, module.in_features
    group = scheme.group_size or inputs
    if inputs % group:
        raise UnsupportedError(f"groups of {group} do not divide the {inputs} inputs of {name}")
    words, padded = count_words(inputs, scheme.bits), -(-inputs // (32 // scheme.bits))
    packed, scale = found.get(f"{name}.{PACKED}"), found.get(f"{name}.{SCALE}")
    if packed == ("I32", (out, padded)) and padded != words:
        raise UnsupportedError(f"it has {scheme.bits} bits as compressed-tensors 0.17 packed them")
    require_tensor(f"{name}.{PACKED}", packed, ("I32",), (out, words), scheme)
    types = (*FLOATS, *STORED)
    require_tensor(f"{name}.{SCALE}", scale, types, (out, inputs // group), scheme)
    if shapes.get(name, (out, inputs)) != (out, inputs):
        raise ArtifactError(
            f"{name}.{SHAPE} says {list(shapes[name])} and the model {[out, inputs]}",
            hint="download or copy the artifact again",
        )
    return Candidate(bits=scheme.bits, group_size=0 if group == inputs else group)


def _read_shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Return {name of a linear: what its `weight_shape` says}."""
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                if name.endswith(f".{SHAPE}"):
                    values = opened.get_tensor(name).flatten().tolist()
                    found[name.rpartition(".")[0]] = tuple(map(int, values))
    return found


def _find_float8(model: nn.Module, found: Mapping[str, Header]) -> dict[str, str]:
    """Return the embeddings and linears that the file has as 8-bit floats.

    Others (positions, embeddings that scale) are converted to the model's type when they are read.
    """
    kinds: dict[str, str] = {}
    for name, module in model.named_modules():
        dtype, shape = found.get(f"{name}.weight", ("", ()))
        if dtype not in STORED or type(module) not in (nn.Embedding, nn.Linear):
            continue
        if shape != tuple(module.weight.shape):
            raise ArtifactError(
                f"{name}.weight is {list(shape)} in the weight file, and the model has "
                f"{list(module.weight.shape)}",
                hint="download or copy the artifact again",
            )
        kinds[name] = STORED[dtype]
    return kinds

"""Refuse, by its small files alone, a directory that is no dense checkpoint, and say what to give.

What transformers says about these names a missing package or a missing key, and not the cause. Each
check reads config.json, the index or the headers of the weight files; no weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cptq.checkpoint.files import INDEX, SINGLE, read_config
from cptq.errors import ModelError
from cptq.layouts.packed import METHOD as PACKED
from cptq.types import TensorSpec

ADAPTER = "adapter_config.json"
MODULES = "modules.json"
#: the methods that transformers knows in `quantization_config`, as their authors spell them
METHODS: Mapping[str, str] = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "auto-round": "AutoRound",
    "intel/auto-round": "AutoRound",
    "hqq": "HQQ",
    "torchao": "torchao",
    "compressed-tensors": "compressed-tensors",
    "fp8": "8-bit floats",
    "fbgemm_fp8": "8-bit floats",
    "mxfp4": "MXFP4",
    "quanto": "quanto",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "eetq": "EETQ",
    "higgs": "HIGGS",
    "quark": "Quark",
    "bitnet": "BitNet",
    "spqr": "SpQR",
    PACKED: "cptq's own packed format",
}
#: ends of tensor names that only one kind of compressed checkpoint has
_MARKS: Mapping[str, str] = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
}
_BITSANDBYTES = ".quant_state.bitsandbytes__"
_CODES = ("F8_E4M3", "F8_E5M2", "I8", "U8", "I32")
_INSTEAD = "give the dense model that it was made from (16 or 32 bits per weight)"


def check_directory(path: Path) -> None:
    """Refuse an adapter, a sentence-transformers directory around a model, and half an index.

    Raises:
        ModelError: says what to give or to type instead.
    """
    if (path / ADAPTER).is_file():
        _refuse_adapter(path)
    if not (path / "config.json").is_file():
        _refuse_sentence_transformers(path)
    if not (path / SINGLE).is_file():
        _refuse_half_index(path / INDEX)


def _refuse_adapter(path: Path) -> None:
    given = _read(path / ADAPTER)
    base, kind = (given.get(key) for key in ("base_model_name_or_path", "peft_type"))
    raise ModelError(
        f"{path} is an adapter ({kind or 'PEFT'}) of {base or 'another model'}, not a whole model",
        allowed="a model that the adapter is merged into",
        hint="merge it first, like this: "
        "from peft import AutoPeftModelForCausalLM; "
        f'AutoPeftModelForCausalLM.from_pretrained("{path}").merge_and_unload()'
        '.save_pretrained("MERGED"), and copy the tokenizer into MERGED',
    )


def _refuse_sentence_transformers(path: Path) -> None:
    modules = _read(path / MODULES) if (path / MODULES).is_file() else []
    named = [str(m.get("path", "")) for m in modules if isinstance(m, dict)]
    places = [place for place in named if place and (path / place / "config.json").is_file()]
    inside = [place for place in places if "architectures" in read_config(path / place)]
    if inside:
        raise ModelError(
            f"{path} is a sentence-transformers directory; its model is in {inside[0]}/",
            hint=f"type {path / inside[0]}",
        )


def _refuse_half_index(index: Path) -> None:
    if index.is_file() and "metadata" not in _read(index):
        raise ModelError(
            f'{index} has no "metadata", and transformers opens no index without',
            hint='add the line "metadata": {}, before "weight_map"',
        )


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a type of weights that torch does not have.

    Raises:
        ModelError: names the entry and its value.
    """
    for place, part in _list_parts(config):
        for key in ("dtype", "torch_dtype"):
            name = part.get(key)
            if isinstance(name, str) and not isinstance(getattr(torch, name, None), torch.dtype):
                raise ModelError(
                    f"{path / 'config.json'} says {place}{key} {name!r}, which torch does not have",
                    allowed="float32, bfloat16, float16",
                    hint="correct the entry, or remove it",
                )


def _list_parts(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "", config
    for name, part in config.items():
        if name.endswith("_config") and isinstance(part, dict) and name != "quantization_config":
            yield f"{name}.", part


def find_method(config: Mapping[str, Any]) -> str | None:
    """Return how config.json says that the weights are compressed; None: it does not."""
    stated = config.get("quantization_config")
    if stated is None:
        return None
    if not isinstance(stated, dict):
        return "an unknown method"
    method = stated.get("quant_method")
    if method is None and any(stated.get(f"load_in_{bits}bit") for bits in (4, 8)):
        method = "bitsandbytes"
    return METHODS.get(str(method), str(method or "an unknown method"))


def refuse_compressed(source: str, config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that is compressed already, where a dense one is needed.

    Raises:
        ModelError: names the method, and what to give instead.
    """
    method = find_method(config)
    if method is not None:
        raise ModelError(
            f"{source} is compressed already ({method})",
            allowed="a dense checkpoint",
            hint=f"{_INSTEAD}; cptq eval takes artifacts",
        )


def check_stored(source: str, config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> None:
    """Refuse tensors of a compressed checkpoint whose config.json does not say how to read them.

    transformers would drop them, or take codes for weights.

    Raises:
        ModelError: names a tensor, and what to give instead.
    """
    if config.get("quantization_config") is not None:
        return
    for name in stored:
        found = [kind for mark, kind in _MARKS.items() if name.endswith(mark)]
        if found or _BITSANDBYTES in name:
            raise ModelError(
                f"{source} is compressed already ({(*found, 'bitsandbytes')[0]}: it holds {name}), "
                "and its config.json has no quantization_config",
                allowed="a dense checkpoint",
                hint=_INSTEAD,
            )
    scaled = {name.rpartition(".")[0]: name for name in stored if "scale" in name.split(".")[-1]}
    for name, spec in stored.items():
        scale = scaled.get(name.removesuffix(".weight"))
        if name.endswith(".weight") and spec.dtype in _CODES and scale is not None:
            raise ModelError(
                f"{source} holds {name} as codes ({spec.dtype}) beside their scale {scale}, and "
                "its config.json has no quantization_config: the scales would be dropped",
                allowed="a dense checkpoint",
                hint=f"multiply codes and scales out, or {_INSTEAD}",
            )


def _read(path: Path) -> Any:
    """Return a JSON file, or an empty object if it is damaged, which others report."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return {}

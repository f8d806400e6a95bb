"""The content of an artifact to be written, independent of format and source.

`compress` builds it from a model in memory, `export` from an artifact on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import TORCH_DTYPES
from cptq.errors import ArtifactError
from cptq.layouts.safetensors_header import SHARD_BYTES
from cptq.types import (
    ActivationRecord,
    CompressedLayer,
    Emit,
    LayerSpec,
    ModelKind,
    Notice,
    TensorSpec,
)

_FLOAT8 = ("F8_E4M3", "F8_E5M2")
#: {type in memory: storage types whose values it holds exactly}
_EXACT_IN = {
    torch.float64: ("F64", "F32", "F16", "BF16", *_FLOAT8),
    torch.float32: ("F32", "F16", "BF16", *_FLOAT8),
    torch.float16: ("F16", *_FLOAT8),
    torch.bfloat16: ("BF16", *_FLOAT8),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Content:
    """A model as weights and their companion files.

    `path` is the directory with config.json and the tokenizer, `tensors` are those of a dense
    artifact (ties once, in storage types), `layers` all weight matrices in forward order and
    `compressed` the compressed ones by the name of their weight tensor. `fetch` returns a dense
    tensor by name, in any floating type that holds it, or None if there is none. `hub_id` is the
    base model's name on the Hub, if it came from there. `shard_bytes`: most bytes of tensors in one
    weight file, where a format has several. `activations` says by which method and share the layers
    got the rules that they have.
    """

    source: str
    path: Path
    kind: ModelKind
    family: str
    fingerprint: str
    tensors: tuple[TensorSpec, ...]
    layers: tuple[LayerSpec, ...]
    compressed: Mapping[str, CompressedLayer]
    fetch: Callable[[str], Tensor | None]
    tokenizer: PreTrainedTokenizerBase | None = None
    attention: str | None = None
    hub_id: str | None = None
    shard_bytes: int = SHARD_BYTES
    activations: ActivationRecord | None = None

    @property
    def parameters(self) -> int:
        """Number of stored weights, tied ones counted once."""
        return sum(spec.numel for spec in self.tensors)

    @property
    def base_name(self) -> str:
        """The Hub id, or the name of a local directory (never its path)."""
        return self.path.name if Path(self.source).expanduser().is_dir() else self.source

    def get_dense(self, spec: TensorSpec) -> Tensor:
        """Return the value of a dense tensor in its storage type.

        Raises:
            ArtifactError: there is no such tensor.
        """
        value = self.fetch(spec.name)
        if value is None:
            raise ArtifactError(f"{spec.name} is in the checkpoint but not in the loaded model")
        return value.to(TORCH_DTYPES[spec.dtype])


def build_content(
    model: LoadedModel,
    layers: Sequence[CompressedLayer],
    emit: Emit,
    shard_bytes: int = SHARD_BYTES,
    activations: ActivationRecord | None = None,
) -> Content:
    """Build the content from a model in memory and its compressed layers.

    Raises:
        ArtifactError: the model is already compressed; a layer occurs twice or is not in it.
    """
    if model.quantized:
        raise ArtifactError(
            f"{model.source} is already compressed", hint="compress the model it was made from"
        )
    _report_rounded(model, emit)
    return Content(
        source=model.source,
        path=model.path,
        kind=model.kind,
        family=model.family,
        fingerprint=model.fingerprint,
        tensors=model.tensors,
        layers=model.layers,
        compressed=index_by_weight(layers, model.tensors),
        fetch=model.fetch,
        tokenizer=model.tokenizer,
        attention=getattr(model.config, "_attn_implementation", None),
        hub_id=None if Path(model.source).expanduser().is_dir() else model.source,
        shard_bytes=shard_bytes,
        activations=activations,
    )


def index_by_weight(
    layers: Sequence[CompressedLayer], tensors: Sequence[TensorSpec]
) -> dict[str, CompressedLayer]:
    """Index layers by the name of the tensor that they replace.

    Raises:
        ArtifactError: a layer occurs twice or its weight is not among the tensors.
    """
    known = {spec.name for spec in tensors}
    found: dict[str, CompressedLayer] = {}
    for layer in layers:
        name = layer.spec.weight_name
        if name not in known or name in found:
            raise ArtifactError(f"{name} is {'twice' if name in found else 'not'} in the model")
        found[name] = layer
    return found


def _report_rounded(model: LoadedModel, emit: Emit) -> None:
    """Emit a warning for dense values that were rounded by the type that the model ran in."""
    values = ((spec.name, model.fetch(spec.name)) for spec in model.tensors)
    types = {name: value.dtype for name, value in values if value is not None}
    rounded = [
        spec.name
        for spec in model.tensors
        if spec.name in types and spec.dtype not in _EXACT_IN.get(types[spec.name], (spec.dtype,))
    ]
    if rounded:
        wide = any(spec.dtype == "F64" for spec in model.tensors)
        way = "cptq runs in float32 at most" if wide else "run in float32 (--dtype float32)"
        message = (
            f"{len(rounded)} tensors ran in a narrower type than the checkpoint's and are written "
            f"rounded; {way}{'' if wide else ' to keep them exact'}"
        )
        emit(Notice(kind="warning", subject=rounded[0], message=message))

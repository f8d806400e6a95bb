"""`gguf`: one file for llama.cpp, tokenizer and settings inside; nothing is quantized again.

Our symmetric integers are ggml's Q4_0, Q5_0 and Q8_0 blocks bit for bit, our asymmetric ones Q4_1
and Q5_1 (`numerics.gguf_blocks`), wherever 32 divides the inputs and the groups and float16 holds
the scales, and scales times zero points (`numerics.grid`). Matrices that stayed dense are
F16 where float16 holds every value, else BF16 or F32 as they are stored; vectors, and what
llama.cpp insists on, are F32. So the file's weights are the artifact's weights, exactly.

Limits: families of `artifact.gguf.families`. K-quants are not written: their scales are integers of
6 bits (Q6_K: 8) times one float16 per 256 weights, which ours are by chance alone; a search would
have to fit all scales of a super-block at once, on a grid of its own.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from cptq import __version__
from cptq.artifact.companions import LICENCE, copy_companions
from cptq.artifact.content import Content
from cptq.artifact.formats.interface import Format, build_refusal
from cptq.artifact.gguf.families import (
    Config,
    Family,
    compute_rope_factors,
    find_family,
    order_rows,
)
from cptq.artifact.gguf.reload import compute_gguf_digests, reload_in_llama_cpp
from cptq.artifact.gguf.remarks import report_differences
from cptq.artifact.gguf.vocabulary import add_vocabulary, find_tokenizer_model, read_tokenizer
from cptq.artifact.reload import ReloadCheck, ReloadSample
from cptq.checkpoint.weights import TORCH_DTYPES
from cptq.errors import ArtifactError
from cptq.layouts.gguf import (
    BLOCK_BYTES,
    GGUF_LAYOUT,
    shape_refusal,
    type_of,
    type_refusal,
)
from cptq.numerics.gguf_blocks import compute_minimum, fits_float16, pack_blocks
from cptq.types import CompressedLayer, Emit, ModelKind, TensorSpec

_FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9}
_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One tensor of the file: its name there, where it comes from, its type."""

    name: str
    spec: TensorSpec
    kind: str
    layer: CompressedLayer | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        if self.layer is not None:
            return self.layer.spec.shape
        return self.spec.shape[::-1] if self.transposed else self.spec.shape

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Shape of the bytes, uint8."""
        *rows, last = self.shape
        width = last // 32 * BLOCK_BYTES[self.kind] if self.layer else last * _WIDTHS[self.kind]
        return (*rows, width)


class Gguf(Format):
    """See the head of this module."""

    name = "gguf"
    layout = GGUF_LAYOUT
    tags = ("gguf", "llama.cpp")
    library = None

    def check(self, content: Content) -> None:
        config = read_config(content)
        family = find_family(config, content.kind)
        find_tokenizer_model(read_tokenizer(content.path))
        _refuse_layers(list(content.compressed.values()))
        list(_list_entries(content, family, config))

    def nbytes(self, content: Content) -> int:
        """At most; the vocabulary is counted as twice its tokenizer.json."""
        config = read_config(content)
        entries = list(_list_entries(content, find_family(config, content.kind), config))
        data = sum(int(np.prod(entry.byte_shape)) + 32 + 128 for entry in entries)
        return data + 2 * (content.path / "tokenizer.json").stat().st_size + (1 << 16)

    def write(self, content: Content, place: Path, emit: Emit) -> dict[str, int]:
        path = place / make_file_name(content)
        config = read_config(content)
        family = find_family(config, content.kind)
        entries = list(_list_entries(content, family, config))
        report_differences([spec.name for spec in content.tensors], family, config, emit)
        _write_file(path, content, config, family, entries, emit)
        copy_companions(content, place, emit, only=LICENCE)
        return {path.name: path.stat().st_size}

    def check_reload(
        self,
        place: Path,
        kind: ModelKind,
        sample: ReloadSample,
        emit: Emit,
        source: Path | None = None,
    ) -> ReloadCheck:
        tokenizer = None if source is None else source / "tokenizer.json"
        return reload_in_llama_cpp(find_only_file(place), kind, sample, emit, tokenizer)

    def digests(self, place: Path, files: Iterable[str]) -> dict[str, str]:
        return {n: d for name in files for n, d in compute_gguf_digests(place / name).items()}

    def describe_loading(self, content: Content) -> Sequence[str]:
        return [
            "```bash",
            f'llama-cli -m {make_file_name(content)} -p "Once upon a time"',
            "```",
            "",
            "Or `Llama(model_path=...)` of llama-cpp-python, or any program built on llama.cpp. "
            "The tokenizer and all settings are inside the file.",
            "",
        ]


GGUF = Gguf()


def make_file_name(content: Content) -> str:
    """The base model's name as a file name."""
    return re.sub(r"[^\w.-]+", "-", content.base_name.rpartition("/")[2]) + ".gguf"


def find_only_file(place: Path) -> Path:
    """The one GGUF file of a directory.

    Raises:
        ArtifactError: there is none, or more than one.
    """
    found = sorted(place.glob("*.gguf"))
    if len(found) != 1:
        raise ArtifactError(f"{place} holds {len(found)} GGUF files", allowed="one")
    return found[0]


def read_config(content: Content) -> dict[str, Any]:
    """All settings of the model, those at their defaults too."""
    try:
        config = AutoConfig.from_pretrained(content.path, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ArtifactError(f"{content.path / 'config.json'} cannot be read: {error}") from error
    found: dict[str, Any] = config.to_dict()
    return found


def _refuse_layers(layers: Sequence[CompressedLayer]) -> None:
    """Layers that no block type holds exactly, by reason."""
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        why = _explain_refusal(layer)
        if why is not None:
            reasons.setdefault(why, []).append(layer.spec.name)
    for why, names in reasons.items():
        raise build_refusal(
            names,
            f"GGUF cannot hold {why}",
            allowed="what cptq compress --runtime llamacpp plans; or --format dense",
        )


def _explain_refusal(layer: CompressedLayer) -> str | None:
    inputs, candidate = layer.spec.shape[1], layer.result.candidate
    kind = type_of(candidate)
    if kind is None:
        return type_refusal(candidate)
    shape = shape_refusal(inputs, inputs // layer.scale.shape[1])
    if shape is not None:
        return shape
    if not fits_float16(layer.scale):
        return "scales that are not exact in float16"
    if layer.zero is not None and not fits_float16(compute_minimum(layer.scale, layer.zero, kind)):
        return "scales times zero points that are not exact in float16"
    return None


def _list_entries(content: Content, family: Family, config: Config) -> Iterator[_Entry]:
    """The tensors of the file, in the order of the checkpoint."""
    blocks = config.get("num_hidden_layers") or config["n_layer"]
    names = family.names(blocks)
    conv1d = {spec.weight_name for spec in content.layers if spec.transposed}
    for spec in content.tensors:
        if spec.name.endswith(family.left_out):
            continue
        name = names.get_name(family.known_name(spec.name), (".weight", ".bias"))
        if name is None:
            raise ArtifactError(
                f"llama.cpp's {family.arch.name.lower()} has no place for {spec.name}"
            )
        layer = content.compressed.get(spec.name)
        if layer is not None:
            kind = type_of(layer.result.candidate)
            assert kind is not None
        else:
            kind = _choose_dense_type(content, spec, family)
        yield _Entry(name=name, spec=spec, kind=kind, layer=layer, transposed=spec.name in conv1d)


def _choose_dense_type(content: Content, spec: TensorSpec, family: Family) -> str:
    """F32 for vectors; for a matrix the narrowest type that llama.cpp takes and that is exact."""
    if len(spec.shape) < 2 or spec.name.endswith(family.always_f32):
        return "F32"
    return "F16" if spec.dtype == "F16" or fits_float16(content.dense(spec)) else spec.dtype


def _write_file(
    path: Path,
    content: Content,
    config: Config,
    family: Family,
    entries: Sequence[_Entry],
    emit: Emit,
) -> None:
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[family.arch])
    _describe(writer, content, entries)
    family.sizes(writer, config)
    add_vocabulary(writer, content.path, config["vocab_size"], emit)
    factors = compute_rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, np.dtype("f4"), 4 * len(factors))
    for entry in entries:
        shape, kind = entry.byte_shape, gguf.GGMLQuantizationType[entry.kind]
        size = int(np.prod(shape))
        writer.add_tensor_info(entry.name, shape, np.dtype("u1"), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for entry in entries:
        order = order_rows(family, config, entry.spec.name)
        writer.write_tensor_data(_pack_bytes(content, entry, order))
    writer.close()
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _describe(writer: gguf.GGUFWriter, content: Content, entries: Sequence[_Entry]) -> None:
    kinds = Counter(entry.kind for entry in entries if entry.layer is not None)
    writer.add_name(content.base_name)
    writer.add_file_type(_FILE_TYPES[kinds.most_common(1)[0][0]] if kinds else 1)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string("cptq.version", __version__)
    writer.add_string("cptq.base_fingerprint", content.fingerprint)


def _pack_bytes(content: Content, entry: _Entry, order: Tensor | None) -> np.ndarray[Any, Any]:
    """The bytes of a tensor, uint8 of `entry.byte_shape`."""
    layer = entry.layer
    if layer is not None:
        parts = [x if x is None else x.cpu() for x in (layer.codes, layer.scale, layer.zero)]
        if order is not None:
            parts = [x if x is None else x[order] for x in parts]
        codes, scale, zero = parts
        assert codes is not None
        assert scale is not None
        packed: np.ndarray[Any, Any] = pack_blocks(codes, scale, entry.kind, zero).numpy()
        return packed
    value = content.dense(entry.spec).detach().cpu()
    value = value.T if entry.transposed else value
    value = (value if order is None else value[order]).to(TORCH_DTYPES[entry.kind]).contiguous()
    raw: np.ndarray[Any, Any] = value.view(torch.uint8).numpy()
    return raw

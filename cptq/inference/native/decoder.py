"""A whole causal decoder in C: one call takes tokens to logits.

    decoder = NativeDecoder(model, capacity=1024)
    logits_V = decoder.run(ids)       # a prompt, or the next token; the cache is inside

Which models: those of `FAMILIES`, packed or dense in any mixture, on the CPU. Weights are read
where they are, nothing is copied but norms, biases and rotations, in float32. What a family
computes is described in decoder.c; that a given model really is computed so is checked when a
decoder is made: a few tokens go through it and through the model's own forward, with exact
products, and logits must agree. So a configuration that is not known here is refused and not
computed wrongly.

Limits: one sequence at a time, no sliding window shorter than the capacity, no rotation that
changes with the length.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cptq.inference import activations, operations
from cptq.inference.float8 import Float8Embedding, Float8Linear
from cptq.inference.modules import PackedLinear, PackedModule
from cptq.inference.native.library import (
    DENSE_TYPES,
    LibraryError,
    Projection,
    describe_dense,
    describe_weight,
    load_library,
)
from cptq.inference.reference import select_rows
from cptq.layouts.activations import THRESHOLD

#: codes of enum cptq_norm and enum cptq_activation
RMS_NORM, LAYER_NORM = 0, 1
ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu": 2, "relu": 3}
#: codes of enum cptq_rule
RULES = {"value": 1, "channel": 1, "spread": 2, "gate": 3}
#: CPTQ_KEY_TILE: the cache holds a multiple of so many tokens
KEY_TILE = 32
DENSE_MODULES = (nn.Linear, nn.Embedding, Conv1D, Float8Linear, Float8Embedding)
ALL = slice(None)
#: a prompt goes through in parts of so many tokens, which bounds the workspace
CHUNK = 256
#: rotations that do not depend on the length of the text
FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
#: tokens of the comparison with the model's forward
CHECKED = 8
#: how far logits may differ, as a share of their largest, by the type that the model computes in
TOLERANCES = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 0.2}


class UnsupportedModelError(Exception):
    """The decoder cannot compute this model; says why."""


_PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")
_NORMS = ("attention_norm", "attention_norm_bias", "mlp_norm", "mlp_norm_bias")
_HEAD_NORMS = ("query_norm", "key_norm")


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, Projection) for name in _PROJECTIONS),
        *((name, ctypes.c_void_p) for name in (*_NORMS, *_HEAD_NORMS)),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("blocks", "width", "heads", "key_heads", "head")),
        *((name, ctypes.c_int64) for name in ("inner", "vocabulary", "capacity")),
        *((name, ctypes.c_int32) for name in ("norm", "activation", "exact", "rules")),
        *((name, ctypes.c_float) for name in ("epsilon", "scale")),
        ("block", ctypes.POINTER(_Block)),
        ("embedding", Projection),
        *((name, ctypes.c_void_p) for name in ("positions", "cosine", "sine")),
        *((name, ctypes.c_void_p) for name in ("final_norm", "final_norm_bias")),
        ("to_logits", Projection),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
    )


class NativeDecoder:
    """A model with a cache for one sequence.

    Args:
        model: a causal language model of transformers; it must stay as it is and alive.
        capacity: tokens of the longest sequence, prompt included.

    Attributes:
        capacity: as given.
        length: tokens that are in the cache.

    Raises:
        UnsupportedModelError: another family, a configuration that is not known, too long a
            sequence, or no C library.
    """

    def __init__(self, model: Any, *, capacity: int) -> None:
        try:
            self._library = load_library()
        except LibraryError as error:
            raise UnsupportedModelError(f"the C library of cptq is missing: {error}") from error
        builder = _Builder(model, max(capacity, CHECKED))
        self._struct, self._kept = builder.build(), builder.kept
        self._vocabulary, self.capacity = int(self._struct.vocabulary), capacity
        self._memory = torch.empty(0, dtype=torch.uint8)
        self.length = 0
        self._compare_with(model)

    def reset(self, length: int = 0) -> None:
        """Forget all but the first `length` tokens."""
        self.length = min(self.length, length)

    def run(self, ids: Sequence[int]) -> Tensor:
        """Append tokens; return the logits after the last, float32 (vocabulary,).

        Raises:
            ValueError: more tokens than the capacity has room for.
            IndexError: an id outside the vocabulary.
        """
        if not ids or self.length + len(ids) > self.capacity:
            raise ValueError(f"{self.length + len(ids)} tokens; 1 to {self.capacity} have room")
        self._struct.exact = operations.is_exact()
        self._struct.rules = activations.is_enabled()
        for start in range(0, len(ids), CHUNK):
            logits_TV = self._run_part(ids[start : start + CHUNK], every=False)
        return logits_TV[0]

    def _run_part(self, ids: Sequence[int], *, every: bool) -> Tensor:
        """Append some tokens; return the logits of the last, or of every one."""
        threads = torch.get_num_threads()
        logits_TV = torch.empty(len(ids) if every else 1, self._vocabulary)
        memory = self._get_memory(len(ids), threads)
        failed = self._library.cptq_decode(
            ctypes.byref(self._struct),
            (ctypes.c_int64 * len(ids))(*ids),
            len(ids),
            self.length,
            int(every),
            logits_TV.data_ptr(),
            memory.data_ptr(),
            memory.nbytes,
            threads,
        )
        if failed:
            raise IndexError("a token id lies outside the vocabulary")
        self.length += len(ids)
        return logits_TV

    def _get_memory(self, tokens: int, threads: int) -> Tensor:
        wanted = self._library.cptq_decoder_bytes(ctypes.byref(self._struct), tokens, threads)
        if self._memory.nbytes < wanted:
            self._memory = torch.empty(wanted, dtype=torch.uint8)
        return self._memory

    def _compare_with(self, model: Any) -> None:
        """Raise where the first tokens do not come out as the model's own forward has them."""
        count = min(CHECKED, self._vocabulary)
        ids = torch.arange(count) * (self._vocabulary // count)
        # without rules: an input at its threshold may fall on either side of it
        with (
            torch.no_grad(),
            operations.exact_products(),
            activations.without_activation_sparsity(),
        ):
            logits_TV = model(ids[None], use_cache=False).logits[0]
            expected_TV = logits_TV.float()
            self._struct.exact, self._struct.rules = 1, 0
            found_TV = torch.cat(
                [
                    self._run_part(ids[:-1].tolist(), every=True),
                    self._run_part(ids[-1:].tolist(), every=True),
                ]
            )
        self.reset()
        error = float((found_TV - expected_TV).abs().max() / expected_TV.abs().max())
        if not error < TOLERANCES.get(logits_TV.dtype, 0.0):
            raise UnsupportedModelError(f"logits differ by {error:.1g} from the model's own")


class _Builder:
    """Describes a model to the library; `kept` holds what the structures point to."""

    def __init__(self, model: Any, capacity: int) -> None:
        self.kept: list[Any] = []
        self._model, self._config = model, model.config
        _refuse_unknown(model, capacity)
        self._capacity = -(-capacity // KEY_TILE) * KEY_TILE

    def build(self) -> _Decoder:
        build = FAMILIES[self._config.model_type]
        decoder = _Decoder(capacity=self._capacity)
        blocks = build(self, decoder)
        decoder.blocks, decoder.block = len(blocks), (_Block * len(blocks))(*blocks)
        head = self._model.get_output_embeddings()
        decoder.to_logits, decoder.vocabulary = self.project(head), _count_outputs(head)
        shape = (len(blocks), decoder.key_heads, self._capacity, decoder.head)
        decoder.keys, decoder.values = self.keep(torch.zeros(shape)), self.keep(torch.zeros(shape))
        self.kept.append(decoder.block)
        return decoder

    def keep(self, tensor: Tensor | None) -> int | None:
        """Return the address of a float32 copy (or of the tensor itself, if it is one)."""
        if tensor is None:
            return None
        tensor = tensor.detach().float().contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def project(self, module: Any, rows: slice = ALL) -> Projection:
        """Describe a packed or dense linear, Conv1D or embedding, or some of its rows (outputs)."""
        bias = getattr(module, "bias", None)
        bias = self.keep(None if bias is None else bias[rows])
        if isinstance(module, PackedModule):
            packed = module.packed
            if packed.mask is not None or packed.pattern is not None:
                raise UnsupportedModelError("it has sparse weights")
            packed = packed if rows == ALL else select_rows(packed, rows)
            self.kept += [module, packed]
            found = Projection(weight=describe_weight(packed), bias=bias)
            self._describe_rule(found, module, rows)
            return found
        weight: Tensor = getattr(module, "floats", module.weight).detach()
        if type(module) not in DENSE_MODULES or weight.dtype not in DENSE_TYPES:
            raise UnsupportedModelError(f"it has a {type(module).__name__} of {weight.dtype}")
        weight = (weight.T if type(module) is Conv1D else weight)[rows].contiguous()
        self.kept.append(weight)
        described = describe_dense(weight)
        described.bias = bias
        return described

    def _describe_rule(self, found: Projection, module: PackedModule, rows: slice) -> None:
        """Set the rule by which a packed linear drops inputs, or a gate outputs."""
        rule = module.rule if isinstance(module, PackedLinear) else None
        if rule is None or rule.kind == "zeros":
            return
        if rule.kind not in RULES or (rule.kind == "gate" and rows != ALL):
            raise UnsupportedModelError(f"it drops inputs by the rule {rule.kind}")
        assert isinstance(module, PackedLinear)
        threshold = module.rule_tensors[THRESHOLD]
        found.rule, found.thresholds = RULES[rule.kind], threshold.numel()
        found.threshold = self.keep(threshold)

    def describe_norm(self, block: _Block, place: str, norm: Any) -> None:
        """Set a norm of a block, and its bias where it has one."""
        setattr(block, place, self.keep(norm.weight))
        if place not in _HEAD_NORMS:
            setattr(block, f"{place}_bias", self.keep(getattr(norm, "bias", None)))


def _refuse_unknown(model: Any, capacity: int) -> None:
    config = model.config
    if config.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(f"the family {config.model_type!r} is not among {known}")
    if any(not parameter.is_cpu for parameter in model.parameters()):
        raise UnsupportedModelError("it is not on the CPU")
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and capacity > longest:
        raise UnsupportedModelError(f"{capacity} tokens exceed its {longest} positions")
    window = getattr(config, "sliding_window", None)
    if window is not None and capacity > window:
        raise UnsupportedModelError(f"{capacity} tokens exceed its window of {window}")


def _count_outputs(module: Any) -> int:
    if isinstance(module, PackedModule):
        return module.shape[0]
    return int(module.nf if type(module) is Conv1D else module.weight.shape[0])


def _set_activation(decoder: _Decoder, name: str) -> None:
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(f"its activation is {name!r}")
    decoder.activation = ACTIVATIONS[name]


def _build_llama(builder: _Builder, decoder: _Decoder) -> list[_Block]:
    """Llama and those that differ by biases, norms of heads or fused linears (`FAMILIES`)."""
    body = builder._model.model
    layers, config = body.layers, builder._config
    attention = layers[0].self_attn
    decoder.embedding, decoder.width = builder.project(body.embed_tokens), config.hidden_size
    decoder.heads, decoder.key_heads = config.num_attention_heads, config.num_key_value_heads
    decoder.head, decoder.inner = attention.head_dim, config.intermediate_size
    decoder.norm, decoder.epsilon = RMS_NORM, body.norm.variance_epsilon
    decoder.scale = attention.scaling
    decoder.final_norm = builder.keep(body.norm.weight)
    _set_activation(decoder, config.hidden_act)
    _set_rotation(builder, decoder, body.rotary_emb)
    return [_build_llama_block(builder, layer) for layer in layers]


def _set_rotation(builder: _Builder, decoder: _Decoder, rotary: Any) -> None:
    kind = getattr(rotary, "rope_type", "default")
    if kind not in FIXED_ROTATIONS:
        raise UnsupportedModelError(f"its rotation is {kind!r}")
    positions = torch.arange(builder._capacity)[None]
    cosine, sine = rotary(torch.zeros(1, dtype=torch.float32), positions)
    half = decoder.head // 2
    if cosine.shape[-1] != decoder.head or not torch.equal(cosine[..., :half], cosine[..., half:]):
        raise UnsupportedModelError("it rotates a part of each head")
    decoder.cosine = builder.keep(cosine[0, :, :half])
    decoder.sine = builder.keep(sine[0, :, :half])


def _build_llama_block(builder: _Builder, layer: Any) -> _Block:
    attention, mlp = layer.self_attn, layer.mlp
    block = _Block(output=builder.project(attention.o_proj), down=builder.project(mlp.down_proj))
    if hasattr(attention, "qkv_proj"):  # Phi-3: outputs one after the other
        query, key = attention.o_proj.in_features, layer.self_attn.num_key_value_heads
        ends = (query, key * attention.head_dim, key * attention.head_dim)
        _split_rows(builder, block, ("query", "key", "value"), attention.qkv_proj, ends)
        inner = mlp.down_proj.in_features
        _split_rows(builder, block, ("gate", "up"), mlp.gate_up_proj, (inner, inner))
    else:
        block.query, block.key = map(builder.project, (attention.q_proj, attention.k_proj))
        block.value = builder.project(attention.v_proj)
        block.gate, block.up = map(builder.project, (mlp.gate_proj, mlp.up_proj))
    builder.describe_norm(block, "attention_norm", layer.input_layernorm)
    builder.describe_norm(block, "mlp_norm", layer.post_attention_layernorm)
    for place, name in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
        if getattr(attention, name, None) is not None:
            builder.describe_norm(block, place, getattr(attention, name))
    return block


def _split_rows(
    builder: _Builder, block: _Block, places: Sequence[str], module: Any, counts: Sequence[int]
) -> None:
    """Give each place of a block its rows of a fused linear."""
    first = 0
    for place, count in zip(places, counts, strict=True):
        setattr(block, place, builder.project(module, slice(first, first + count)))
        first += count


def _build_opt(builder: _Builder, decoder: _Decoder) -> list[_Block]:
    body, config = builder._model.model.decoder, builder._config
    if not config.do_layer_norm_before or body.project_in is not None:
        raise UnsupportedModelError("it is one of OPT's with the norm after, or a projected width")
    decoder.embedding, decoder.width = builder.project(body.embed_tokens), config.hidden_size
    decoder.heads = decoder.key_heads = config.num_attention_heads
    decoder.head, decoder.inner = config.hidden_size // config.num_attention_heads, config.ffn_dim
    decoder.norm, decoder.epsilon = LAYER_NORM, body.final_layer_norm.eps
    decoder.scale = decoder.head**-0.5
    decoder.final_norm = builder.keep(body.final_layer_norm.weight)
    decoder.final_norm_bias = builder.keep(body.final_layer_norm.bias)
    _set_activation(decoder, config.activation_function)
    first = body.embed_positions.offset
    decoder.positions = builder.keep(body.embed_positions.weight[first:])
    return [_build_opt_block(builder, layer) for layer in body.layers]


def _build_opt_block(builder: _Builder, layer: Any) -> _Block:
    attention = layer.self_attn
    modules = {
        "query": attention.q_proj,
        "key": attention.k_proj,
        "value": attention.v_proj,
        "output": attention.out_proj,
        "up": layer.fc1,
        "down": layer.fc2,
    }
    block = _Block(**{place: builder.project(module) for place, module in modules.items()})
    builder.describe_norm(block, "attention_norm", layer.self_attn_layer_norm)
    builder.describe_norm(block, "mlp_norm", layer.final_layer_norm)
    return block


def _build_gpt2(builder: _Builder, decoder: _Decoder) -> list[_Block]:
    body, config = builder._model.transformer, builder._config
    decoder.embedding, decoder.width = builder.project(body.wte), config.n_embd
    decoder.heads = decoder.key_heads = config.n_head
    decoder.head = config.n_embd // config.n_head
    decoder.inner = _count_outputs(body.h[0].mlp.c_fc)
    decoder.norm, decoder.epsilon = LAYER_NORM, config.layer_norm_epsilon
    decoder.scale = decoder.head**-0.5
    decoder.final_norm = builder.keep(body.ln_f.weight)
    decoder.final_norm_bias = builder.keep(body.ln_f.bias)
    _set_activation(decoder, config.activation_function)
    decoder.positions = builder.keep(body.wpe.weight)
    return [_build_gpt2_block(builder, layer, config.n_embd) for layer in body.h]


def _build_gpt2_block(builder: _Builder, layer: Any, width: int) -> _Block:
    block = _Block(
        output=builder.project(layer.attn.c_proj),
        up=builder.project(layer.mlp.c_fc),
        down=builder.project(layer.mlp.c_proj),
    )
    _split_rows(builder, block, ("query", "key", "value"), layer.attn.c_attn, (width,) * 3)
    builder.describe_norm(block, "attention_norm", layer.ln_1)
    builder.describe_norm(block, "mlp_norm", layer.ln_2)
    return block


#: `model_type` -> fills a decoder in and returns its blocks
FAMILIES: dict[str, Callable[[_Builder, _Decoder], list[_Block]]] = {
    "llama": _build_llama,
    "mistral": _build_llama,
    "qwen2": _build_llama,
    "qwen3": _build_llama,
    "phi3": _build_llama,
    "opt": _build_opt,
    "gpt2": _build_gpt2,
}

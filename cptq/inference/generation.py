"""Decode with a causal language model: the one place where cptq chooses tokens.

`decode` reads a prompt and chooses new tokens after it, greedily or by sampling, and notes when
each was known. Two ways lead there:

- "own loop": a packed model on the CPU whose family the C library knows, one row. The library runs
  the whole model in one call per token (`native.decoder`).
- "generate": `model.generate` of transformers, for all else. The checkpoint's own generation config
  is set aside meanwhile: only what the caller names is applied, so that two models do the same work
  (no penalties, no top-k, no stop token that was not asked for).

Greedy tokens are the same either way, up to ties within float32 rounding; draws are not.

Cost: one forward pass of the prompt, whose last logits alone are computed, and one pass per further
token, with a cache of keys and values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from cptq.inference.modules import PackedLinear, PackedModule, find_packed_modules
from cptq.inference.native.decoder import NativeDecoder, UnsupportedModelError

#: the rules by which the linears of a model drop inputs, and which tensors they have
Rules = tuple[tuple[object, ...], ...]
#: the decoder of a model and the rules that it was made with, as long as the model lives; not with
#: the model, which may be copied
_DECODERS: WeakKeyDictionary[Any, tuple[NativeDecoder, Rules]] = WeakKeyDictionary()
#: how tokens were decoded: by transformers' `generate`, or by a loop of cptq
Way = Literal["generate", "own loop"]
Receive = Callable[[list[int]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is chosen: the most likely one (`temperature` 0), or drawn.

    Attributes:
        temperature: divides the logits before the softmax.
        top_p: draw from the fewest most likely tokens whose probabilities sum up to this share.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """New tokens and when each was known.

    Attributes:
        way: what decoded.
        why: of a packed model that `generate` decoded: why not the own loop; else empty.
        steps: per step the tokens of all rows (B).
        began: clock in seconds before the prompt was read.
        known: clock in seconds when the tokens of each step were known.
    """

    way: Way
    why: str = ""
    steps: tuple[tuple[int, ...], ...]
    began: float
    known: tuple[float, ...]

    @property
    def first_seconds(self) -> float:
        """Seconds until the first token: reading the prompt and choosing."""
        return self.known[0] - self.began

    @property
    def later_seconds(self) -> float:
        """Seconds from the first token to the last: `len(steps) - 1` steps."""
        return self.known[-1] - self.known[0]


def decode(
    model: Any,
    ids_BT: Tensor,
    *,
    new_tokens: int,
    stop: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    receive: Receive | None = None,
) -> Decoded:
    """Read a prompt (rows, tokens) and choose up to `new_tokens` tokens after each row.

    Args:
        model: a causal language model of transformers.
        ids_BT: token ids without padding.
        new_tokens: at most so many steps; exactly so many without `stop`.
        stop: token ids that end a row. They are among the steps.
        sampling: how a token is chosen.
        receive: called after each step with the tokens of all rows.
    """
    clock = _Clock(receive)
    decoder = _find_decoder(model, ids_BT, new_tokens)
    if isinstance(decoder, NativeDecoder):
        began = time.perf_counter()
        _run_own_loop(decoder, ids_BT[0].tolist(), new_tokens, tuple(stop), sampling, clock)
        steps, known = tuple(clock.steps), tuple(clock.known)
        return Decoded(way="own loop", why="", steps=steps, began=began, known=known)
    config = _build_config(new_tokens, tuple(stop), sampling)
    torch.manual_seed(sampling.seed)
    with _set_config(model, config):
        began = time.perf_counter()
        model.generate(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), streamer=clock)
    steps, known = tuple(clock.steps), tuple(clock.known)
    return Decoded(way="generate", why=decoder, steps=steps, began=began, known=known)


def _find_decoder(model: Any, ids_BT: Tensor, new_tokens: int) -> NativeDecoder | str:
    """Return a decoder in C for a packed model and one row, or why there is none.

    It is kept for the model; one that is too small is made anew. A dense model wants none.
    """
    packed = find_packed_modules(model)
    if not packed:
        return ""
    if len(ids_BT) != 1 or not ids_BT.is_cpu:
        return "it takes one sequence, on the CPU"
    capacity = ids_BT.shape[1] + new_tokens
    rules = _list_rules(packed.values())
    decoder, known = _DECODERS.get(model, (None, ()))
    if decoder is None or decoder.capacity < capacity or rules != known:
        try:
            decoder = NativeDecoder(model, capacity=capacity)
        except UnsupportedModelError as error:
            return str(error)
        _DECODERS[model] = decoder, rules
    decoder.reset()
    return decoder


def _list_rules(modules: Iterable[PackedModule]) -> Rules:
    ruled = [m for m in modules if isinstance(m, PackedLinear) and m.rule is not None]
    return tuple((m.rule, *map(id, m.rule_tensors.values())) for m in ruled)


@torch.no_grad()
def _run_own_loop(
    decoder: NativeDecoder,
    ids: list[int],
    new_tokens: int,
    stop: tuple[int, ...],
    sampling: Sampling,
    clock: _Clock,
) -> None:
    generator = torch.Generator().manual_seed(sampling.seed)
    for _ in range(new_tokens):
        token = choose_token(decoder.run(ids), sampling, generator)
        clock.note([token])
        if token in stop:
            return
        ids = [token]


def choose_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the most likely token, or draw one as `Sampling` says."""
    if sampling.temperature <= 0:
        return int(logits_V.argmax())
    p_V, order_V = (logits_V / sampling.temperature).softmax(dim=0).sort(descending=True)
    before_V = p_V.cumsum(dim=0) - p_V
    p_V[before_V >= sampling.top_p] = 0.0  # the first token always stays
    return int(order_V[torch.multinomial(p_V, 1, generator=generator)])


def _build_config(new_tokens: int, stop: tuple[int, ...], sampling: Sampling) -> GenerationConfig:
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new_tokens,
        do_sample=sampling.temperature > 0,
        eos_token_id=list(stop) or None,
        pad_token_id=stop[0] if stop else 0,  # fills rows that have ended
        **(drawn if sampling.temperature > 0 else {}),
    )


@contextmanager
def _set_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Let `generate` read this config alone: it completes a passed one by the model's own."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


class _Clock(BaseStreamer):
    """Notes tokens and times; `generate` hands it the prompt first, then each step."""

    def __init__(self, receive: Receive | None) -> None:
        self.receive = receive
        self.steps: list[tuple[int, ...]] = []
        self.known: list[float] = []
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Take the prompt, or the tokens of a step; they are on the CPU, so the device is done."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.note([int(token) for token in value.reshape(-1)])

    def note(self, tokens: list[int]) -> None:
        """Take the tokens of a step."""
        self.known.append(time.perf_counter())
        self.steps.append(tuple(tokens))
        if self.receive is not None:
            self.receive(tokens)

    def end(self) -> None:
        """Do nothing: the times end with the last token."""

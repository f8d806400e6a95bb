"""`cptq generate`: continue a text with a model or an artifact, piece by piece.

What can be refused is refused before any weight is read: another kind of model, a chat without a
template, a prompt that the context does not hold.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch

from cptq.checkpoint.loader import load_model, read_spec
from cptq.checkpoint.model import LoadedModel, ModelSpec
from cptq.checkpoint.tokenizer import check_token_ids
from cptq.config import GenerateSettings
from cptq.errors import DataError, ModelError, UsageError
from cptq.inference.generation import Decoded, Sampling, decode
from cptq.inference.text_stream import TextStream
from cptq.report.generation import Ending, GenerateOutcome
from cptq.types import Emit, Fragment, Notice

STDIN = "-"


def generate(settings: GenerateSettings, emit: Emit) -> GenerateOutcome:
    """Continue a text; emits its pieces as `Fragment`s.

    Raises:
        ModelError: not a causal language model, or it has no tokenizer.
        UsageError: a chat without a template, or a prompt that is empty or too long.
        DataError: the prompt on the standard input is not text.
    """
    prompt = read_prompt(settings.prompt)
    spec = read_spec(settings.model, emit)
    ids = encode_prompt(spec, prompt, chat=settings.chat)
    room = find_room(len(ids), settings.max_new_tokens, spec.max_positions)
    if room < settings.max_new_tokens:
        _announce_end(spec, len(ids), settings.max_new_tokens, room, emit)
    model = load_model(settings.model, emit)
    ends = find_end_tokens(model.module, spec.tokenizer)
    decoded, text = _write_text(settings, model, ids, room, ends, emit)
    if decoded.why:
        message = f"decoded by transformers' generate, not by cptq's faster loop: {decoded.why}"
        emit(Notice(kind="info", subject=spec.source, message=message))
    return GenerateOutcome(
        text=text,
        prompt_tokens=len(ids),
        new_tokens=len(decoded.steps),
        first_seconds=decoded.first_seconds,
        later_seconds=decoded.later_seconds,
        ending=_find_ending(decoded, ends, room < settings.max_new_tokens),
        way=decoded.way,
    )


def _announce_end(spec: ModelSpec, prompt: int, new: int, room: int, emit: Emit) -> None:
    message = (
        f"{prompt} tokens of the prompt and {new} new ones exceed the context of "
        f"{spec.max_positions}: at most {room} are generated"
    )
    emit(Notice(kind="warning", subject="--max-new-tokens", message=message))


def _write_text(
    settings: GenerateSettings,
    model: LoadedModel,
    ids: list[int],
    room: int,
    ends: tuple[int, ...],
    emit: Emit,
) -> tuple[Decoded, str]:
    """Decode up to `room` tokens, emit their text piece by piece, and return it whole."""
    stream, pieces = TextStream(_build_decoder(model.tokenizer), ids), list[str]()

    def show(piece: str) -> None:
        if piece:
            pieces.append(piece)
            emit(Fragment(text=piece))

    decoded = decode(
        model.module,
        torch.tensor([ids], device=model.device),
        new_tokens=room,
        stop=ends,
        sampling=Sampling(
            temperature=settings.temperature or 0.0,
            top_p=settings.top_p or 1.0,
            seed=settings.seed,
        ),
        receive=lambda tokens: show(stream.add(tokens[0])),
    )
    show(stream.finish())
    return decoded, "".join(pieces)


def read_prompt(given: str) -> str:
    """Return the prompt, read from the standard input for `-` (without its last line end).

    Raises:
        UsageError: there is nothing to continue.
        DataError: the standard input is not UTF-8 text.
    """
    if given != STDIN:
        return given
    try:
        text = sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError("the prompt on the standard input is not UTF-8 text") from error
    if not text:
        raise UsageError("the standard input holds no prompt", hint="type --prompt TEXT")
    return text


def encode_prompt(spec: ModelSpec, prompt: str, *, chat: bool) -> list[int]:
    """Return the token ids of the prompt, as the tokenizer or its chat template makes them.

    Raises:
        ModelError: not a causal language model, no tokenizer, or a template that fails.
        UsageError: a chat without a template, or a prompt without tokens.
    """
    if spec.kind != "causal-lm":
        raise ModelError(
            f"{spec.source} is of kind {spec.kind}, which writes no text",
            allowed="causal language models",
        )
    tokenizer: Any = spec.tokenizer
    if tokenizer is None:
        raise ModelError(f"{spec.source} has no tokenizer that can be loaded")
    ids = _apply_template(spec, prompt) if chat else tokenizer(prompt)["input_ids"]
    if not ids:
        raise UsageError(f"the prompt {prompt!r} has no tokens", hint="type a longer one")
    check_token_ids(spec, [ids])
    return list(ids)


def _apply_template(spec: ModelSpec, prompt: str) -> list[int]:
    tokenizer: Any = spec.tokenizer
    if not tokenizer.chat_template:
        raise UsageError(
            f"--chat needs a chat template, and the tokenizer of {spec.source} has none",
            hint="leave out --chat",
        )
    try:
        found = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )
    except Exception as error:  # a template is code of the model's author
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"the chat template of {spec.source} fails: {reason}") from error
    ids: list[int] = found["input_ids"]
    return ids


def find_room(prompt: int, new: int, context: int | None) -> int:
    """Find how many tokens can be written after a prompt of so many tokens (context None: any).

    Raises:
        UsageError: the prompt leaves no room.
    """
    if context is None:
        return new
    if prompt >= context:
        raise UsageError(
            f"the prompt has {prompt} tokens, and the model's context is {context}",
            allowed=f"at most {context - 1} tokens",
            hint="shorten the prompt",
        )
    return min(new, context - prompt)


def find_end_tokens(module: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that end a text: those of the generation config, else the tokenizer's."""
    known = getattr(module.generation_config, "eos_token_id", None)
    if known is None:
        known = tokenizer.eos_token_id
    ids: Iterable[int] = known if isinstance(known, list | tuple) else [known]
    return tuple(int(token) for token in ids if token is not None)


def _build_decoder(tokenizer: Any) -> Any:
    return lambda ids: tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def _find_ending(decoded: Decoded, ends: tuple[int, ...], cut: bool) -> Ending:
    if decoded.steps[-1][0] in ends:
        return "end of text"
    return "context" if cut else "new tokens"

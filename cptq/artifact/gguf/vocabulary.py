"""Write a tokenizer.json as llama.cpp's vocabulary.

Three tokenizer models are supported: byte-level BPE (`gpt2`), BPE over characters with byte
fallback, as from SentencePiece (`llama`; the rank of a merge becomes its score), and WordPiece
(`bert`; words get a leading U+2581 and continuations lose their ##). llama.cpp has no data for
pre-tokenization, only names that stand for code, so only known pre-tokenizers can be written.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from cptq.errors import ArtifactError
from cptq.types import Emit, Notice

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: {regular expression of a pre-tokenizer: llama.cpp's name for it}
PRE_TOKENIZERS: Mapping[str, str] = {
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"\p{N}" + _REST: "qwen2",
}
#: special tokens that the file lists (cls is its bos)
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE = "\u2581"


def add_vocabulary(writer: gguf.GGUFWriter, directory: Path, size: int, emit: Emit) -> None:
    """Write tokens, merges, special tokens and the chat template.

    Args:
        writer: of the file.
        directory: contains tokenizer.json.
        size: rows of the embedding; ids without a token become unused tokens.
        emit: receives notices.

    Raises:
        ArtifactError: no tokenizer.json, or an unsupported tokenizer model.
    """
    # silence a warning on pairs of texts, which are not used here
    logging.getLogger("gguf").setLevel(logging.ERROR)
    data = read_tokenizer(directory)
    model = find_tokenizer_model(data)
    tokens, types = _list_tokens(data, size, model)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(find_pre_tokenizer(data, emit) if model == "gpt2" else "default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if model == "llama":
        writer.add_token_scores(_score_tokens(data, tokens))
    if model != "bert":
        writer.add_add_space_prefix(_is_space_added(data))
    special = gguf.SpecialVocab(
        directory, load_merges=model == "gpt2", special_token_types=SPECIAL, n_vocab=size
    )
    if special.chat_template is None and (directory / "chat_template.jinja").is_file():
        special.chat_template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    special.add_to_gguf(writer, quiet=True)
    if model != "bert" and "bos" not in special.add_special_token:
        writer.add_add_bos_token(False)


def read_tokenizer(directory: Path) -> dict[str, Any]:
    """Read tokenizer.json as plain data."""
    path = directory / "tokenizer.json"
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        data["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} does not contain an exportable tokenizer ({type(error).__name__})",
            hint="save a fast tokenizer with transformers",
        ) from error
    return data


def find_tokenizer_model(data: Mapping[str, Any]) -> str:
    """Return the tokenizer model: `gpt2`, `llama` or `bert`."""
    model = data["model"]
    if model.get("type") == "WordPiece":
        return "bert"
    if model.get("type") == "BPE":
        return "llama" if model.get("byte_fallback") else "gpt2"
    raise ArtifactError(
        f"a tokenizer of type {model.get('type')!r} cannot be exported", allowed="BPE, WordPiece"
    )


def _list_tokens(data: Mapping[str, Any], size: int, model: str) -> tuple[list[str], list[int]]:
    added = {item["id"]: item for item in data.get("added_tokens", ())}
    texts = {number: text for text, number in data["model"]["vocab"].items()}
    texts |= {number: item["content"] for number, item in added.items()}
    if max(texts, default=0) >= size:
        raise ArtifactError(f"the tokenizer has token ids beyond the {size} rows of the embedding")
    kinds = [
        _classify_token(i, texts, added, model, data["model"].get("unk_token")) for i in range(size)
    ]
    named = [texts.get(i, f"[PAD{i}]") for i in range(size)]
    if model == "bert":
        control = gguf.TokenType.CONTROL
        named = [
            t if k == control else _mark_word_start(t) for t, k in zip(named, kinds, strict=True)
        ]
    return named, [int(kind) for kind in kinds]


def _classify_token(
    number: int,
    texts: Mapping[int, str],
    added: Mapping[int, Mapping[str, Any]],
    model: str,
    unknown: str | None,
) -> gguf.TokenType:
    if number not in texts:
        return gguf.TokenType.UNUSED
    if model == "llama" and texts[number] == unknown:
        return gguf.TokenType.UNKNOWN
    if number in added:
        special = added[number].get("special")
        return gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
    if model == "llama" and _BYTE.fullmatch(texts[number]):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL


def _mark_word_start(token: str) -> str:
    return token[2:] if token.startswith("##") else _SPACE + token


def _score_tokens(data: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """Return minus the rank of the first merge that makes each token; others come last."""
    ranks: dict[str, int] = {}
    merges = data["model"].get("merges", [])
    for rank, merge in enumerate(merges):
        pair = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _is_space_added(data: Mapping[str, Any]) -> bool:
    """Return whether the tokenizer puts a space before a text."""
    words = json.dumps([data.get("normalizer"), data.get("pre_tokenizer")])
    return (
        '"Prepend"' in words
        or '"add_prefix_space": true' in words
        or '"prepend_scheme": "first"' in words
    )


def find_pre_tokenizer(data: Mapping[str, Any], emit: Emit) -> str:
    """Return llama.cpp's name for the pre-tokenizer; GPT-2's, with a warning, if it has none."""
    before = data.get("pre_tokenizer") or {}
    parts = before.get("pretokenizers", [before])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        name = PRE_TOKENIZERS.get(parts[0].get("pattern", {}).get("Regex", ""))
        if name is not None:
            return name
    message = "llama.cpp has no name for its pre-tokenizer; GPT-2's is written, so llama.cpp "
    message += "tokenizes some texts differently"
    emit(Notice(kind="warning", subject="tokenizer", message=message))
    return "gpt-2"

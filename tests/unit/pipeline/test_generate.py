"""`generate`: what it writes, what it refuses before weights are read, where it stops."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import cptq
from cptq.config import GenerateSettings, ModelSettings
from cptq.errors import CptqError, DataError, ModelError, UsageError
from cptq.inference.generation import decode
from cptq.pipeline import generate as function
from cptq.pipeline.generate import find_end_tokens, find_room, read_prompt
from cptq.report.generation import GenerateOutcome, compute_rate
from cptq.types import Fragment
from tests.conftest import Heard, TinyModel
from tests.tiny_models import POSITIONS

PROMPT = "The quick brown fox "


def run(model: Path, heard: Heard, **options: Any) -> GenerateOutcome:
    asked = {"prompt": PROMPT, "max_new_tokens": 8, **options}
    return function(GenerateSettings(model=ModelSettings(model=str(model)), **asked), heard)


def join(heard: Heard) -> str:
    return "".join(event.text for event in heard if isinstance(event, Fragment))


def test_it_continues_greedily_and_piece_by_piece(tiny_model: TinyModel, heard: Heard) -> None:
    path = tiny_model("llama")
    found = run(path, heard)
    tokenizer, model = AutoTokenizer.from_pretrained(path), cptq.load(path, device="cpu")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    for _ in range(8):
        with torch.no_grad():
            token = model(input_ids=ids).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, token], dim=1)
    whole = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert found.text == join(heard) == whole.removeprefix(PROMPT)
    assert (found.prompt_tokens, found.new_tokens) == (ids.shape[1] - 8, 8)
    assert (found.ending, found.way) == ("new tokens", "generate")


def test_a_draw_is_repeated_by_its_seed(tiny_model: TinyModel, heard: Heard) -> None:
    path = tiny_model("llama")
    one, two = (run(path, heard, temperature=2.0, top_p=0.9, seed=4).text for _ in range(2))
    assert one == two != run(path, heard, temperature=2.0, top_p=0.9, seed=5).text


def test_it_stops_where_the_model_ends_the_text(
    tiny_model: TinyModel, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model("llama")
    ids = AutoTokenizer.from_pretrained(path)(PROMPT, return_tensors="pt")["input_ids"]
    end = decode(cptq.load(path, device="cpu"), ids, new_tokens=1).steps[0]
    module = sys.modules["cptq.pipeline.generate"]
    monkeypatch.setattr(module, "find_end_tokens", lambda *_: end)
    found = run(path, heard)
    assert (found.ending, found.new_tokens) == ("end of text", 1)
    assert found.decode_rate is None


def test_the_context_ends_the_text_and_it_is_said(tiny_model: TinyModel, heard: Heard) -> None:
    found = run(tiny_model("llama"), heard, prompt="fox " * 60, max_new_tokens=900)
    assert found.prompt_tokens + found.new_tokens == POSITIONS or found.ending == "end of text"
    (said,) = heard.notices
    assert f"context of {POSITIONS}" in said
    assert f"at most {POSITIONS - found.prompt_tokens}" in said


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(
    tiny_model: TinyModel, heard: Heard
) -> None:
    with pytest.raises(UsageError) as caught:
        run(tiny_model("llama"), heard, prompt="a b " * 400)
    assert str(POSITIONS) in caught.value.problem
    assert not heard.stages  # no weight was read


@pytest.mark.parametrize("arch", ["bert", "bert-encoder", "bert-mlm"])
def test_other_kinds_are_refused_by_name(tiny_model: TinyModel, heard: Heard, arch: str) -> None:
    with pytest.raises(ModelError) as caught:
        run(tiny_model(arch), heard)
    assert str(tiny_model(arch)) in caught.value.problem
    assert not heard.stages


def test_a_chat_needs_a_template(tiny_model: TinyModel, heard: Heard, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--chat needs a chat template"):
        run(tiny_model("llama"), heard, chat=True)
    path = tmp_path / "chatty"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    plain = len(tokenizer(PROMPT)["input_ids"])
    path.mkdir()
    for file in tiny_model("llama").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    assert run(path, heard, chat=True).prompt_tokens == plain + 2
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    tokenizer.save_pretrained(path)
    with pytest.raises(ModelError, match="no such role"):
        run(path, heard, chat=True)


def test_the_standard_input_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(" one\ntwo\n"))
    assert read_prompt("-") == " one\ntwo"
    assert read_prompt(" - ") == " - "
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    with pytest.raises(UsageError, match="holds no prompt"):
        read_prompt("-")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    with pytest.raises(DataError, match="UTF-8"):
        read_prompt("-")


def test_the_room_after_a_prompt() -> None:
    assert find_room(5, 8, None) == 8
    assert find_room(5, 8, 13) == 8
    assert find_room(5, 8, 12) == 7
    assert find_room(5, 8, 6) == 1
    with pytest.raises(UsageError):
        find_room(6, 8, 6)


def test_the_tokens_that_end_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    class Holder:
        eos_token_id: Any = None

    module, tokenizer = Holder(), Holder()
    module.generation_config = Holder()  # type: ignore[attr-defined]
    assert find_end_tokens(module, tokenizer) == ()
    tokenizer.eos_token_id = 7
    assert find_end_tokens(module, tokenizer) == (7,)
    module.generation_config.eos_token_id = [3, 4]  # type: ignore[attr-defined]
    assert find_end_tokens(module, tokenizer) == (3, 4)


def test_the_statistics() -> None:
    assert compute_rate(10, 4.0) == 2.5
    assert compute_rate(0, 4.0) is None
    assert compute_rate(3, 0.0) is None
    found = GenerateOutcome(
        text="x", prompt_tokens=1, new_tokens=5, first_seconds=0.5, later_seconds=2.0,
        ending="context", way="generate",
    )  # fmt: skip
    assert (found.prompt_rate, found.decode_rate) == (2.0, 2.0)
    assert found.describe() == (
        "prompt: 1 token, 2/s; new: 5 tokens, 2/s; first after 0.5 s; ended by: context; "
        "decoded by: generate"
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"temperature": -1.0}, "--temperature"),
        ({"top_p": 0.5}, "--top-p"),
        ({"temperature": 1.0, "top_p": 1.5}, "--top-p"),
        ({"top_k": 3}, "top_k"),
        ({"device": "gpu"}, "--device"),
    ],
)
def test_bad_options(options: dict[str, Any], named: str) -> None:
    with pytest.raises(CptqError, match=named):
        cptq.generate("no/such-model", "text", **options)


def test_the_api_takes_the_prompt_as_it_is(
    tiny_model: TinyModel, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[GenerateSettings] = []
    monkeypatch.setattr("cptq.api.execute", lambda settings, emit: seen.append(settings))
    cptq.generate("m", " a b \n", progress=heard, max_new_tokens=2)
    assert (seen[0].prompt, seen[0].max_new_tokens) == (" a b \n", 2)

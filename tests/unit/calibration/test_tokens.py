"""Calibration batches against the tokenizer itself; what is told and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from cptq.calibration.batches import split_batches, stack_rows
from cptq.calibration.tokens import Calibration, build_calibration, digest_tokens
from cptq.checkpoint.model import LoadedModel
from cptq.config import CalibrationSettings, ModelSettings
from cptq.data.glue import load_glue
from cptq.data.overlap import decode_sketch, measure_overlap
from cptq.data.text import load_text
from cptq.errors import CalibrationError, DataError, UnknownNameError
from cptq.evaluation.sentences import encode_sentences
from cptq.types import Event, Notice
from tests.conftest import TinyModel
from tests.reference.sensitivity import loaded
from tests.tiny_models import SENTENCES, pair_tokenizer, tiny_tokenizer, write_rte

ENCODERS = ("bert", "bert-encoder", "bert-mlm", "mpnet")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No local data, no network, no cache."""
    monkeypatch.delenv("CPTQ_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def causal(tiny_model: TinyModel) -> LoadedModel:
    return loaded(tiny_model("llama"))


@pytest.fixture(scope="module")
def encoder(tiny_model: TinyModel) -> LoadedModel:
    return loaded(tiny_model("bert-encoder"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A document a line, none like another."""
    path = tmp_path / "prose.txt"
    path.write_text("\n".join(f"{i}: {SENTENCES[i % 5]}" for i in range(40)) + "\n")
    return path


def build(
    model: LoadedModel, source: Path | str, events: list[Event] | None = None, **options: Any
) -> Calibration:
    options = {"samples": 6, "seqlen": 16, "batch_size": 4} | options
    settings = CalibrationSettings(calibration=str(source), **options)
    emit = (events if events is not None else []).append
    return build_calibration(model, settings, ModelSettings(model="any"), emit)


def rows(calibration: Calibration) -> list[list[int]]:
    """The real tokens of every row."""
    return [
        ids[mask.bool()].tolist()
        for batch in calibration.batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def notices(events: list[Event]) -> list[tuple[str, str]]:
    return [(e.kind, e.subject) for e in events if isinstance(e, Notice)]


def test_a_causal_model_gets_windows_of_the_running_text(causal: LoadedModel, text: Path) -> None:
    found = build(causal, text)
    ids = causal.tokenizer.encode(text.read_text(), add_special_tokens=False)
    windows = [ids[start : start + 16] for start in range(0, len(ids) - 15, 16)]
    places = [windows.index(row) for row in rows(found)]
    assert len(set(places)) == 6
    assert places != sorted(places)
    assert [tuple(b["input_ids"].shape) for b in found.batches] == [(4, 16), (2, 16)]
    assert all(bool(batch["attention_mask"].all()) for batch in found.batches)
    assert found.tokens == found.record.tokens == 96


def test_every_window_begins_with_the_bos_that_a_tokenizer_adds(
    tiny_model: TinyModel, text: Path
) -> None:
    """And holds no other special token."""
    model = loaded(tiny_model("llama"))
    plain = build(model, text)
    model.tokenizer = tiny_tokenizer(causal=False)
    assert [model.tokenizer("a")["input_ids"][i] for i in (0, -1)] == [1, 2]
    found = build(model, text, samples=1000)
    ids = model.tokenizer.encode(text.read_text(), add_special_tokens=False)
    windows = [[1, *ids[start : start + 15]] for start in range(0, len(ids) - 14, 15)]
    assert sorted(rows(found)) == sorted(windows)
    assert not {1, 2} & {token for row in rows(found) for token in row[1:]}
    assert (found.record.bos, plain.record.bos) == (True, False)
    assert found.record.tokens == 16 * len(windows)


def test_a_window_must_have_room_beside_its_bos(tiny_model: TinyModel, text: Path) -> None:
    model = loaded(tiny_model("llama"))
    model.tokenizer = tiny_tokenizer(causal=True, bos=True)
    with pytest.raises(CalibrationError, match="beside the BOS"):
        build(model, text, seqlen=1)
    assert {len(row) for row in rows(build(model, text, seqlen=2))} == {2}


@pytest.mark.parametrize("bos", [False, True])
def test_apart_no_window_crosses_a_border(
    causal: LoadedModel, tiny_model: TinyModel, tmp_path: Path, bos: bool
) -> None:
    model = loaded(tiny_model("llama"))
    model.tokenizer = tiny_tokenizer(causal=True, bos=bos)
    words = " ".join(SENTENCES).split()
    documents = [" ".join(words[: 3 + 3 * i]) + f" {i}" for i in range(15)] + ["", "short"]
    path = tmp_path / "documents.txt"
    path.write_text("\n".join(documents))
    events: list[Event] = []
    found = build(model, path, events, documents="apart", seqlen=50, samples=1000, batch_size=3)
    room = 50 - bos
    ids = [model.tokenizer.encode(d, add_special_tokens=False) for d in documents]
    pieces = [row[i : i + room] for row in ids for i in range(0, len(row), room)]
    wanted = [[1] * bos + piece for piece in pieces if len(piece) >= 32]
    assert sorted(rows(found)) == sorted(wanted)
    assert len({len(row) for row in wanted}) > 1
    assert found.record.documents == "apart"
    assert found.record.tokens == sum(map(len, wanted))
    dropped = len(pieces) - len(wanted)
    (told,) = [e.message for e in events if getattr(e, "subject", "") == "--documents"]
    assert told.startswith(f"{dropped} documents or ends of documents with fewer than 32 tokens")
    # no padding, which would reach the experts of a mixture; batches are full where they can be
    assert all(bool(batch["attention_mask"].all()) for batch in found.batches)
    assert max(len(batch["input_ids"]) for batch in found.batches) > 1


def test_joined_is_the_default_and_says_so(causal: LoadedModel, text: Path) -> None:
    found = build(causal, text)
    assert found.record.documents == "joined"
    assert rows(build(causal, text, documents="joined")) == rows(found)


def test_documents_too_short_to_keep_apart_are_refused(causal: LoadedModel, text: Path) -> None:
    path = text.with_name("tiny.txt")
    path.write_text("a b\nc d\n")
    with pytest.raises(CalibrationError, match="32 tokens") as caught:
        build(causal, path, documents="apart", seqlen=64)
    assert "--documents joined" in str(caught.value.hint)


def test_apart_a_document_of_wikitext_is_an_article(causal: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "wikitext-2-raw").mkdir()
    article = "".join(f" {line} \n" for line in SENTENCES)
    raw = f" \n = One = \n \n{article} = = Section = = \n{article} = Two = \n \n{article}"
    (tmp_path / "wikitext-2-raw" / "wiki.train.raw").write_text(raw)
    options = {"data_dir": tmp_path, "documents": "apart", "seqlen": 256, "samples": 9}
    found = [causal.tokenizer.decode(row) for row in rows(build(causal, "wikitext", **options))]
    begins = sorted(text.strip()[:5] for text in found if "= " in text[:9])
    assert begins == ["= One", "= Two"]
    assert not any("= Two" in text[20:] for text in found)


def test_an_encoder_has_nothing_to_keep_apart_and_that_is_said(
    encoder: LoadedModel, text: Path
) -> None:
    events: list[Event] = []
    found = build(encoder, text, events, documents="apart")
    assert ("info", "--documents") in notices(events)
    assert rows(found) == rows(build(encoder, text))
    assert found.record.documents is None


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """RTE's training part."""
    return write_rte(tmp_path, 30)


def with_types(model: LoadedModel) -> LoadedModel:
    """The model with a tokenizer that marks the second sentence, as BERT's does."""
    model.tokenizer = pair_tokenizer()
    return model


def test_a_classifier_is_calibrated_on_pairs_as_it_is_evaluated(
    tiny_model: TinyModel, pairs: Path
) -> None:
    model = with_types(loaded(tiny_model("bert")))
    found = build(model, "glue/rte", data_dir=pairs, seqlen=64)
    spec_rows = encode_sentences(
        model, load_glue("rte", "train", data_dir=pairs).sentences, 64, "rte", print
    ).rows
    known = {tuple(row["input_ids"]): row["token_type_ids"] for row in spec_rows}
    assert set(found.batches[0]) == {"input_ids", "token_type_ids", "attention_mask"}
    types = [
        ids[mask.bool()].tolist()
        for batch in found.batches
        for ids, mask in zip(batch["token_type_ids"], batch["attention_mask"], strict=True)
    ]
    assert [known[tuple(row)] for row in rows(found)] == types
    assert all(set(row) == {0, 1} for row in types)
    assert found.record.pairs
    with torch.no_grad():
        assert model.module(**found.batches[0]).logits.isfinite().all()
    # what is cut, stacked and split keeps the types beside their tokens
    for batch in stack_rows(split_batches(found.batches, tokens=1)):
        assert batch["token_type_ids"].shape == batch["input_ids"].shape
        for ids, kinds in zip(batch["input_ids"], batch["token_type_ids"], strict=True):
            assert known[tuple(ids[: int((ids != 0).sum())].tolist())] == kinds[ids != 0].tolist()


def test_the_fingerprint_of_pairs_is_also_that_of_their_types(
    tiny_model: TinyModel, pairs: Path
) -> None:
    model = loaded(tiny_model("bert"))
    without = build(model, "glue/rte", data_dir=pairs, seqlen=64)
    found = build(with_types(model), "glue/rte", data_dir=pairs, seqlen=64)
    assert rows(without) == rows(found)
    assert without.record.fingerprint == digest_tokens(map(torch.tensor, rows(without)))
    assert without.record.fingerprint != found.record.fingerprint


def test_the_sketch_of_pairs_finds_each_sentence(tiny_model: TinyModel, pairs: Path) -> None:
    found = build(loaded(tiny_model("bert")), "glue/rte", data_dir=pairs, samples=30, seqlen=64)
    sketch = decode_sketch(found.record.sketch)
    sentences = load_glue("rte", "train", data_dir=pairs).sentences
    assert measure_overlap(sketch, [left for left, _ in sentences]).leaks


@pytest.mark.parametrize("arch", ["bert-encoder", "bert-mlm", "llama"])
def test_other_models_get_single_sentences_of_pairs(
    arch: str, tiny_model: TinyModel, pairs: Path
) -> None:
    model = loaded(tiny_model(arch))
    found = build(model, "glue/rte", data_dir=pairs)
    assert not found.record.pairs
    assert set(found.batches[0]) == {"input_ids", "attention_mask"}
    if arch != "llama":
        samples = load_glue("rte", "train", data_dir=pairs).sentences
        encode = model.tokenizer.encode
        known = [encode(s, truncation=True, max_length=16) for pair in samples for s in pair]
        assert all(row in known for row in rows(found))


def test_held_out_pairs_are_not_those_that_calibrate(tiny_model: TinyModel, pairs: Path) -> None:
    model = with_types(loaded(tiny_model("bert")))
    settings = CalibrationSettings(calibration="glue/rte", data_dir=pairs, samples=6, seqlen=64)
    events: list[Event] = []
    found = build_calibration(
        model, settings, ModelSettings(model="any"), events.append, held_out=4
    )
    held = [batch["input_ids"][0].tolist() for batch in found.held_out]
    assert len(held) == 4
    assert not any(row in rows(found) for row in held)
    assert all("token_type_ids" in batch for batch in found.held_out)


@pytest.mark.parametrize("arch", ENCODERS)
def test_other_models_get_a_document_a_row(arch: str, tiny_model: TinyModel, text: Path) -> None:
    model, events = loaded(tiny_model(arch)), []
    found = build(model, text, events, seqlen=128)
    lines = text.read_text().splitlines()
    expected = [model.tokenizer.encode(line) for line in lines]
    places = [expected.index(row) for row in rows(found)]
    assert len(set(places)) == 6
    assert {row[0] for row in rows(found)} == {model.tokenizer.cls_token_id}
    assert {row[-1] for row in rows(found)} == {model.tokenizer.sep_token_id}
    assert notices(events) == []


def test_padding_is_on_the_right_and_no_more_than_needed(encoder: LoadedModel, text: Path) -> None:
    found = build(encoder, text, seqlen=64)
    for batch in found.batches:
        lengths = batch["attention_mask"].sum(1)
        assert int(lengths.max()) == batch["input_ids"].shape[1]
        assert len(lengths.unique()) > 1
        for ids, mask, length in zip(*batch.values(), lengths.tolist(), strict=True):
            assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
            assert set(ids[length:].tolist()) <= {encoder.tokenizer.pad_token_id}
    assert found.tokens == sum(map(len, rows(found)))


def test_long_documents_are_cut_and_it_is_told(encoder: LoadedModel, text: Path) -> None:
    events: list[Event] = []
    found = build(encoder, text, events, seqlen=10)
    assert [len(row) for row in rows(found)] == [10] * 6
    assert {row[-1] for row in rows(found)} == {encoder.tokenizer.sep_token_id}
    assert "6 of 6 documents were cut at 10 tokens" in str(events)


@pytest.mark.parametrize("arch", ["llama", "bert-encoder"])
def test_the_seed_alone_decides(arch: str, tiny_model: TinyModel, text: Path) -> None:
    model = loaded(tiny_model(arch))
    one, again, other = (build(model, text, seed=seed) for seed in (3, 3, 4))
    assert one.record == again.record
    assert all(
        torch.equal(a[name], b[name])
        for a, b in zip(one.batches, again.batches, strict=True)
        for name in a
    )
    assert one.record.fingerprint != other.record.fingerprint
    assert rows(one) != rows(other)
    assert one.record.text_sha256 == other.record.text_sha256


@pytest.mark.parametrize("arch", ["llama", "bert-encoder"])
def test_the_fingerprint_is_that_of_the_tokens(
    arch: str, tiny_model: TinyModel, text: Path
) -> None:
    model = loaded(tiny_model(arch))
    found = build(model, text)
    total = hashlib.sha256()
    for row in rows(found):
        total.update(struct.pack(f"<Q{len(row)}q", len(row), *row))
    assert found.record.fingerprint == total.hexdigest()
    assert build(model, text, batch_size=5).record.fingerprint == found.record.fingerprint
    assert build(model, text, samples=5).record.fingerprint != found.record.fingerprint
    assert rows(build(model, text, samples=5)) == rows(found)[:5]


def test_the_record_tells_where_the_text_is_from(causal: LoadedModel, text: Path) -> None:
    record = build(causal, text, seed=7).record
    assert (record.source, record.origin) == ("prose.txt", "prose.txt")  # no path of a machine
    assert (record.samples, record.seqlen, record.seed) == (6, 16, 7)
    assert record.text_sha256 == hashlib.sha256(text.read_bytes()).hexdigest()


def test_tables_and_json_lines_give_the_same_rows(encoder: LoadedModel, tmp_path: Path) -> None:
    lines = [f"{i} {SENTENCES[i % 5]}" for i in range(12)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    table = ["label\tsentence", *(f"1\t{line}" for line in lines)]
    (tmp_path / "a.tsv").write_text("\n".join(table))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    found = [rows(build(encoder, tmp_path / f"a.{end}", seqlen=64)) for end in ("txt", "tsv")]
    found.append(rows(build(encoder, tmp_path / "a.jsonl", seqlen=64)))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("arch", ["llama", "bert-encoder"])
def test_the_embedded_text_needs_no_file(arch: str, tiny_model: TinyModel) -> None:
    model, events = loaded(tiny_model(arch)), []
    named = build(model, "pydoc")
    assert named.record.source == "pydoc"
    assert named.record.text_sha256 == load_text("pydoc", "calibration").sha256
    stood_in = build(model, "auto", events)
    assert stood_in.record.fingerprint == named.record.fingerprint
    assert "stands in for wikitext" in stood_in.record.notes[0]
    assert ("info", "calibration") in notices(events)


def test_wikitext_is_found_in_the_data_directory(causal: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "wikitext-2-raw").mkdir()
    file = tmp_path / "wikitext-2-raw" / "wiki.train.raw"
    file.write_text("\n".join(f" {line} " for line in SENTENCES))
    for source in ("auto", "wikitext"):
        record = build(causal, source, data_dir=tmp_path).record
        assert (record.source, record.origin) == ("wikitext", "wiki.train.raw")


def test_a_text_shorter_than_a_sample_is_refused(causal: LoadedModel, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time.")
    count = len(causal.tokenizer.encode(short.read_text()))
    match = rf"short\.txt .*\b{count}\b.*\b{count + 1}\b"
    with pytest.raises(CalibrationError, match=match) as caught:
        build(causal, short, seqlen=count + 1)
    assert "--seqlen" in str(caught.value.hint)
    assert rows(build(causal, short, seqlen=count)) == [causal.tokenizer.encode(short.read_text())]


@pytest.mark.parametrize("arch", ["llama", "bert-encoder"])
def test_fewer_samples_than_asked_is_told(arch: str, tiny_model: TinyModel, text: Path) -> None:
    model, events = loaded(tiny_model(arch)), []
    found = build(model, text, events, samples=1000, seqlen=64)
    assert ("warning", "--samples") in notices(events)
    assert found.record.samples == len(rows(found)) < 1000
    if arch == "bert-encoder":
        assert found.record.samples == 40


@pytest.mark.parametrize(
    ("arch", "most"), [("llama", 256), ("gpt2", 256), ("opt", 256), ("roberta", 254)]
)
def test_more_positions_than_the_model_has_are_not_used(
    arch: str, most: int, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model, events = loaded(tiny_model(arch)), []
    (tmp_path / "long.txt").write_text(" ".join(SENTENCES * 5))
    found = build(model, tmp_path / "long.txt", events, seqlen=1000, samples=1)
    assert ("warning", "--seqlen") in notices(events)
    assert found.record.seqlen == found.batches[0]["input_ids"].shape[1] == most
    with torch.no_grad():
        model.module(**found.batches[0])  # and that many it takes


@pytest.mark.parametrize("seqlen", [1, 2])
def test_a_row_must_have_room_for_text(encoder: LoadedModel, text: Path, seqlen: int) -> None:
    with pytest.raises(CalibrationError, match=rf"\b{seqlen}\b.*\b2\b"):
        build(encoder, text, seqlen=seqlen)
    assert [len(row) for row in rows(build(encoder, text, seqlen=3))] == [3] * 6


def test_without_a_tokenizer_nothing_can_be_done(tiny_model: TinyModel, text: Path) -> None:
    model = loaded(tiny_model("llama"))
    model.tokenizer = None
    with pytest.raises(CalibrationError, match=re.escape(model.source)) as caught:
        build(model, text)
    assert "tokenizer.json" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("gone.txt", DataError),
        ("empty.txt", DataError),
        ("wikitext", DataError),
        ("wikitex", UnknownNameError),
    ],
)
def test_a_text_that_is_not_there(
    source: str,
    error: type[Exception],
    causal: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error):
        build(causal, source)


def test_a_test_part_is_told(causal: LoadedModel, text: Path) -> None:
    events: list[Event] = []
    record = build(causal, text.rename(text.with_name("wiki.test.txt")), events).record
    assert "looks like a test part" in record.notes[0]
    assert ("info", "calibration") in notices(events)

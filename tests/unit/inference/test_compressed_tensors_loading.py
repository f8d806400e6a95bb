"""compressed-tensors checkpoints opened packed, beside stock transformers' opening of the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import cptq
from cptq.checkpoint import loader
from cptq.checkpoint.loader import AUTO_CLASSES, load_model
from cptq.config import ModelSettings
from cptq.errors import CptqError
from cptq.inference import operations
from cptq.inference.float8 import Float8Embedding, Float8Linear, find_float8_modules
from cptq.inference.generation import decode
from cptq.inference.modules import find_packed_modules
from cptq.inference.native.library import has_library
from cptq.numerics.float8 import FORMATS
from cptq.types import Candidate, Event, Notice
from tests.conftest import TinyModel
from tests.unit.inference.compressed_builders import write_compressed

pytestmark = [
    pytest.mark.usefixtures("same_process"),
    pytest.mark.skipif(not has_library(), reason="needs the C library, which has to be compiled"),
]

FILE = "model.safetensors"
LAYER = "model.layers.0.self_attn.q_proj"
FAMILIES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"tied": True, "dtype": torch.float16}, "e4m3"),
    ("llama", {"tied": False, "dtype": torch.bfloat16}, "e5m2"),
    ("llama", {"tied": True, "dtype": torch.bfloat16}, ""),
    ("qwen2", {"tied": True}, "e5m2"),
    ("opt", {"tied": True, "dtype": torch.float16}, "e4m3"),
    ("gpt_neox", {"tied": False}, "e4m3"),
    ("bert", {"dtype": torch.float16}, "e4m3"),
    ("bert-encoder", {}, "e5m2"),
    ("bert-mlm", {}, "e4m3"),
    ("generic", {"tied": False}, "e4m3"),
]
#: with and without a vocabulary of 8-bit floats, both of their kinds, tied and not, an encoder
QUICK = ("llama", "gpt_neox", "bert")


@pytest.fixture(scope="module")
def whole(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tied head of 8-bit floats."""
    out = tmp_path_factory.mktemp("compressed") / "out"
    write_compressed(tiny_model("llama", tied=True, dtype=torch.float16), out)
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def open_both(path: Path, dtype: str = "float32") -> tuple[Any, Any]:
    """What cptq makes of a directory, and what stock transformers does."""
    settings = ModelSettings(model=str(path), device="cpu", dtype=dtype)
    events: list[Event] = []
    own = load_model(settings, events.append)
    assert not [e for e in events if isinstance(e, Notice) and e.subject != "tokenizer"]
    auto = getattr(transformers, AUTO_CLASSES[own.kind])
    return own.module, auto.from_pretrained(path, dtype=getattr(torch, dtype)).eval()


def draw(rows: int, length: int = 12, vocabulary: int = 250) -> Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def answer(model: Any, ids_BT: Tensor, **inputs: Tensor) -> Tensor:
    with operations.exact_products():
        output = model(input_ids=ids_BT, **inputs)
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


def check_equal(found: Tensor, expected: Tensor, slack: float = 2e-5) -> None:
    scale = float(expected.float().abs().max())
    torch.testing.assert_close(found, expected, rtol=slack, atol=slack * scale)


def count_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors if t.numel()}.values())


@pytest.mark.parametrize(
    ("arch", "options", "vocabulary"),
    [f if f[0] in QUICK else pytest.param(*f, marks=pytest.mark.slow) for f in FAMILIES],
)
def test_computes_what_stock_transformers_does(
    tiny_model: TinyModel, tmp_path: Path, arch: str, options: dict[str, Any], vocabulary: str
) -> None:
    write_compressed(tiny_model(arch, **options), tmp_path / "out", vocabulary=vocabulary)
    own, stock = open_both(tmp_path / "out")
    assert find_packed_modules(own)
    assert bool(find_float8_modules(own)) == bool(vocabulary)
    for rows, length in ((1, 1), (2, 12), (3, 30)):  # few tokens and many take other ways
        check_equal(answer(own, draw(rows, length)), answer(stock, draw(rows, length)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_differ_by_their_rounding(whole: Path, dtype: str) -> None:
    own, stock = open_both(whole, dtype)
    exact = cptq.load(whole, device="cpu", dtype="float32")
    assert own.dtype is getattr(torch, dtype)
    expected = answer(exact, draw(2))
    slack = 0.05 if dtype == "bfloat16" else 0.01
    check_equal(answer(own, draw(2)).float(), expected, slack)
    check_equal(answer(stock, draw(2)).float(), expected, slack)


def test_the_words_of_the_file_stay_and_nothing_dense_joins_them(whole: Path) -> None:
    own, stock = open_both(whole)
    stored = load_file(whole / FILE)
    assert torch.equal(own.get_submodule(LAYER).weight, stored[f"{LAYER}.weight_packed"])
    floats = own.model.embed_tokens.floats
    assert floats.dtype is torch.float8_e4m3fn
    assert torch.equal(floats.float(), stored["model.embed_tokens.weight"].float())
    assert own.lm_head.weight is own.model.embed_tokens.weight
    before = count_bytes(own)
    answer(own, draw(2))
    own.generate(draw(1), max_new_tokens=3, do_sample=False)
    assert count_bytes(own) == before
    # all that the file has, scales and norms widened to float32
    more = sum(3 * t.numel() for t in stored.values() if t.is_floating_point())
    assert before < (whole / FILE).stat().st_size + more
    answer(stock, draw(2))
    assert before < 0.5 * count_bytes(stock)


def test_a_forward_allocates_no_dense_head(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head of several tiles is converted tile by tile, with and without the C library."""
    write_compressed(tiny_model("llama", tied=False), tmp_path / "out")
    own, stock = open_both(tmp_path / "out")
    monkeypatch.setattr("cptq.inference.reference.TILE", 48 * 7)
    expected = answer(stock, draw(2))
    check_equal(answer(own, draw(2)), expected)
    tiles = list(own.lm_head._iterate_tiles())
    assert max(len(W_RI) for _, W_RI in tiles) == 7
    assert len(tiles) > 30
    monkeypatch.setattr("cptq.inference.float8.has_library", lambda: False)
    check_equal(answer(own, draw(2)), expected)


def test_padded_batches_beams_and_sampling(whole: Path) -> None:
    own, stock = open_both(whole)
    ids, mask = draw(3), torch.ones(3, 12, dtype=torch.long)
    mask[0, :5] = 0
    check_equal(answer(own, ids, attention_mask=mask), answer(stock, ids, attention_mask=mask))
    for options in ({"num_beams": 3}, {"do_sample": True, "temperature": 0.8}, {}):
        found = []
        for model in (own, stock):
            torch.manual_seed(5)
            with operations.exact_products():
                text = model.generate(ids, attention_mask=mask, max_new_tokens=8, **options)
            found.append(text.tolist())
        assert found[0] == found[1], options


@pytest.mark.parametrize("arch", ["llama", "opt", "qwen2"])
def test_decodes_in_the_own_loop(tiny_model: TinyModel, tmp_path: Path, arch: str) -> None:
    write_compressed(tiny_model(arch, tied=True, dtype=torch.float16), tmp_path / "out")
    own, stock = open_both(tmp_path / "out")
    with operations.exact_products():
        found = decode(own, draw(1), new_tokens=9)
        expected = decode(stock, draw(1), new_tokens=9)
    assert (found.way, expected.way) == ("own loop", "generate")
    assert found.steps == expected.steps


def test_pipelines_take_the_model(whole: Path) -> None:
    own, stock = open_both(whole)
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole)
    texts = []
    for model in (own, stock):
        write = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
        with operations.exact_products():
            texts.append(write("a b c", max_new_tokens=5, do_sample=False)[0]["generated_text"])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saves_the_same_checkpoint(whole: Path, tmp_path: Path, dtype: str) -> None:
    """Stock transformers loads what was saved; dense tensors have the model's type, as always."""
    own = cptq.load(whole, device="cpu", dtype=dtype)
    own.save_pretrained(tmp_path / "saved")
    before, after = load_file(whole / FILE), load_file(tmp_path / "saved" / FILE)
    assert before.keys() == after.keys()
    for name, value in before.items():
        packed = "weight_" in name or value.dtype.itemsize == 1
        assert after[name].dtype is (value.dtype if packed else own.dtype), name
        same = value.to(own.dtype) if value.is_floating_point() else value
        assert torch.equal(after[name].to(same.dtype), same), name
    configs = [json.loads((p / "config.json").read_text()) for p in (whole, tmp_path / "saved")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    again, stock = open_both(tmp_path / "saved", dtype)
    assert torch.equal(answer(again, draw(2)), answer(own, draw(2)))
    if dtype == "float32":
        check_equal(answer(again, draw(2)), answer(stock, draw(2)))


def test_shards_are_one_checkpoint(whole: Path, tmp_path: Path) -> None:
    own = cptq.load(whole, device="cpu")
    own.save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    again, stock = open_both(tmp_path / "saved")
    assert torch.equal(answer(again, draw(2)), answer(own, draw(2)))
    check_equal(answer(again, draw(2)), answer(stock, draw(2)))


@pytest.mark.parametrize("tied", [True, False])
def test_dequantizes_to_the_dense_model(tiny_model: TinyModel, tmp_path: Path, tied: bool) -> None:
    write_compressed(tiny_model("llama", tied=tied), tmp_path / "out")
    own, stock = open_both(tmp_path / "out")
    dense = own.dequantize()
    kinds = {type(dense.get_submodule(LAYER)), type(dense.lm_head), type(dense.model.embed_tokens)}
    assert kinds == {nn.Linear, nn.Embedding}
    assert (dense.lm_head.weight is dense.model.embed_tokens.weight) == tied
    check_equal(answer(dense, draw(2)), answer(stock, draw(2)))
    dense.save_pretrained(tmp_path / "dense")
    again = cptq.load(tmp_path / "dense", device="cpu")
    check_equal(answer(again, draw(2)), answer(stock, draw(2)))


def test_conversions_keep_what_is_packed(whole: Path) -> None:
    own = cptq.load(whole, device="cpu")
    half = own.to(torch.bfloat16)
    assert half.dtype is torch.bfloat16
    assert half.model.embed_tokens.weight.dtype is torch.uint8
    assert half.model.embed_tokens(draw(1)).dtype is torch.bfloat16
    assert answer(half, draw(2)).dtype is torch.bfloat16


def test_plain_from_pretrained_does_what_it_did(whole: Path) -> None:
    cptq.load(whole, device="cpu")
    stock = transformers.AutoModelForCausalLM.from_pretrained(whole)
    assert not find_packed_modules(stock)
    assert not find_float8_modules(stock)
    assert stock.config.quantization_config.quant_method == "compressed-tensors"


def test_llm_compressors_w4a16_stays_packed(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Targets that are a class, `ignore` by name and by pattern, extra fields: the library wrote
    this config and packed these weights."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model("llama", tied=False))
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
    config = QuantizationConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head", "re:.*down_proj"],
        format="pack-quantized",
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            W_OGI = module.weight.view(len(module.weight), -1, 16)
            module.weight_scale.data = W_OGI.abs().amax(-1) / 7.5
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "out")
    compressor.update_config(tmp_path / "out")
    own, stock = open_both(tmp_path / "out")
    names = set(find_packed_modules(own))
    assert LAYER in names
    assert not [n for n in names if "down" in n or "lm_head" in n]
    check_equal(answer(own, draw(2)), answer(stock, draw(2)))


def edit_config(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def first_group(config: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = config["config_groups"]["group_0"]
    return group


def explain(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The reason of the notice with which a directory is opened the stock way."""
    heard: list[Event] = []
    monkeypatch.setattr(loader, "load_tokenizer", lambda *_: None)
    with suppress(CptqError):  # what the file holds need not fit what its config now says
        load_model(ModelSettings(model=str(path), device="cpu"), heard.append)
    notices = [event for event in heard if isinstance(event, Notice)]
    assert [notice.kind for notice in notices if "packed" in notice.message] == ["info"]
    return next(notice.message for notice in notices if "packed" in notice.message)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: first_group(q).update(input_activations={"num_bits": 8}), "activations"),
        (lambda q: first_group(q).update(format="int-quantized"), "'int-quantized'"),
        (lambda q: first_group(q)["weights"].update(symmetric=False), "asymmetric"),
        (lambda q: first_group(q)["weights"].update(type="float", num_bits=8), "float with 8"),
        (lambda q: first_group(q)["weights"].update(actorder="group"), "another order"),
        (lambda q: first_group(q)["weights"].update(strategy="tensor"), "'tensor'"),
        (lambda q: q.update(kv_cache_scheme={"num_bits": 8}), "cache"),
        (lambda q: q.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparse"),
        (lambda q: q.update(quantization_status="frozen"), "'frozen'"),
        (lambda q: q.update(config_groups=[1]), "another form"),
    ],
)
def test_what_only_stock_transformers_computes_is_left_to_it(
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any]], object],
    words: str,
) -> None:
    edit_config(copy, change)
    assert words in explain(copy, monkeypatch)


def test_experts_are_left_to_stock_transformers(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model("qwen3_moe")
    same = (Candidate(bits=4, group_size=16),)
    write_compressed(path, tmp_path / "out", linears=same, vocabulary="")
    assert "experts" in explain(tmp_path / "out", monkeypatch)


def test_without_the_c_library_stock_transformers_is_faster(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "has_library", lambda: False)
    assert "C library" in explain(whole, monkeypatch)


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / FILE)
    change(tensors)
    save_file(tensors, path / FILE, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{LAYER}.weight_packed"), f"{LAYER}.weight_packed is missing"),
        (lambda t: t.pop(f"{LAYER}.weight_scale"), f"{LAYER}.weight_scale is missing"),
        (
            lambda t: t.update(
                {f"{LAYER}.weight_packed": t[f"{LAYER}.weight_packed"][:-1].clone()}
            ),
            r"weight_packed is I32 \[\d+, \d+\] in the weight file; w2g16 needs I32 \[48",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight_packed": t[f"{LAYER}.weight_packed"].long()}),
            "weight_packed is I64",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight_shape": torch.tensor([48, 47])}),
            r"weight_shape says \[48, 47\]",
        ),
        (
            lambda t: t.update(
                {"model.embed_tokens.weight": t["model.embed_tokens.weight"][:9].clone()}
            ),
            r"embed_tokens\.weight is \[9, 48\]",
        ),
        (lambda t: t["model.embed_tokens.weight"].view(torch.uint8)[3].fill_(0x7F), "NaN"),
        (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight"),
    ],
)
def test_a_damaged_file_is_one_sentence(
    copy: Path, change: Callable[[dict[str, Tensor]], object], words: str
) -> None:
    rewrite(copy, change)
    with pytest.raises(CptqError, match=words) as caught:
        cptq.load(copy, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_one_sentence(copy: Path) -> None:
    content = (copy / FILE).read_bytes()
    (copy / FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(CptqError) as caught:
        cptq.load(copy, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_group_that_config_json_forgot(copy: Path) -> None:
    edit_config(copy, lambda q: first_group(q)["targets"].remove(LAYER))
    with pytest.raises(CptqError, match=f"packs {LAYER}, for which config.json has no"):
        cptq.load(copy, device="cpu")


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_every_8_bit_float_is_converted_exactly(kind: str) -> None:
    for code in range(256):
        module = Float8Linear((1, 1), kind, bias=False)
        module.weight = nn.Parameter(torch.full((1, 1), code, dtype=torch.uint8), False)
        expected = module.floats.float()
        assert module.is_finite() == bool(torch.isfinite(expected)), code
        if module.is_finite():
            row = Float8Embedding((1, 1), kind)
            row.weight = module.weight
            assert torch.equal(module(torch.ones(1, 1)), expected), code
            assert torch.equal(row(torch.tensor([0])), expected[:1]), code


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
@pytest.mark.parametrize("width", [1, 15, 16, 47, 254])
def test_rows_of_any_width_are_converted_exactly(kind: str, width: int) -> None:
    """Sixteen at a time where the processor can, the rest one by one."""
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes[torch.isfinite(codes.view(FORMATS[kind]).float())]
    module = Float8Linear((len(finite), width), kind, bias=False)
    order = torch.arange(len(finite))[:, None] + torch.arange(width)
    module.weight = nn.Parameter(finite[order % len(finite)], requires_grad=False)
    found = torch.cat([W_RI.clone() for _, W_RI in module._iterate_tiles()])
    assert torch.equal(found, module.floats.float())

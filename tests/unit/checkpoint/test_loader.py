"""Loading: sharded and pickled checkpoints, storage types, and every refusal in one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cptq.checkpoint.files import read_config
from cptq.checkpoint.loader import detect_kind, pick_device, pick_dtype
from cptq.checkpoint.model import LoadedModel
from cptq.errors import ModelError, UsageError
from cptq.types import Event, Notice, TensorSpec
from tests.conftest import TinyModel
from tests.unit.checkpoint.made import copied, edit_config, edit_weights, load, pickled


def same_model(one: LoadedModel, other: LoadedModel) -> bool:
    a, b = one.module.state_dict(), other.module.state_dict()
    return (
        a.keys() == b.keys()
        and all(torch.equal(a[name], b[name]) for name in a)
        and one.tensors == other.tensors
        and one.layers == other.layers
        and one.units == other.units
    )


@pytest.mark.parametrize("arch", ["llama", "bert", "gpt2"])
def test_shards_load_as_a_single_file_does(arch: str, tiny_model: TinyModel) -> None:
    sharded = tiny_model(arch, dtype=torch.float16, shards=True)
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert same_model(load(sharded), load(tiny_model(arch, dtype=torch.float16)))


@pytest.mark.parametrize("shards", [1, 3])
def test_pickles_are_refused_unless_allowed(
    shards: int, tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model("llama", dtype=torch.float16)
    path = pickled(source, tmp_path / "model", shards=shards)
    with pytest.raises(ModelError, match=r"pytorch_model\.bin") as caught:
        load(path)
    assert "--allow-pickle" in str(caught.value.hint)
    model = load(path, allow_pickle=True)
    assert same_model(model, load(source))
    assert {spec.dtype for spec in model.tensors} == {"F16"}


@pytest.mark.parametrize("shards", [1, 3])
def test_the_fingerprint_covers_the_pickled_weights(
    shards: int, tiny_model: TinyModel, tmp_path: Path
) -> None:
    paths = [
        pickled(tiny_model("llama", seed=seed), tmp_path / f"{seed}", shards=shards)
        for seed in (0, 1)
    ]
    assert len({load(path, allow_pickle=True).fingerprint for path in paths}) == 2


def test_safetensors_go_before_pickles(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = copied(tiny_model("llama"), tmp_path / "model")
    (path / "pytorch_model.bin").write_bytes(b"no pickle at all")
    index = {"weight_map": {"a": "not-downloaded.bin"}}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    source = load(tiny_model("llama"))
    assert load(path).fingerprint == source.fingerprint
    assert same_model(load(path, allow_pickle=True), source)


class Hostile:
    """Unpickling this makes a directory."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.marker,)


@pytest.mark.parametrize("damage", ["hostile", "truncated", "empty", "text"])
def test_a_bad_pickle_is_refused_and_runs_nothing(
    damage: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = pickled(tiny_model("llama"), tmp_path / "model")
    file, marker = path / "pytorch_model.bin", tmp_path / "marker"
    if damage == "hostile":
        torch.save({"lm_head.weight": Hostile(marker)}, file)
    else:
        raw = {"truncated": file.read_bytes()[:-3000], "empty": b"", "text": b"oid sha256"}
        file.write_bytes(raw[damage])
    with pytest.raises(ModelError, match=re.escape(str(path))):
        load(path, allow_pickle=True)
    assert not marker.exists()


def test_no_weights_at_all(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = copied(tiny_model("llama"), tmp_path / "model")
    (path / "model.safetensors").unlink()
    for allow in (False, True):
        with pytest.raises(ModelError, match=r"model\.safetensors"):
            load(path, allow_pickle=allow)


def test_a_weight_that_float16_does_not_hold_is_refused(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    path = edit_weights(copied(tiny_model("llama"), tmp_path / "x"), lambda t: t[name].mul_(1e7))
    with pytest.raises(ModelError, match=re.escape(name)) as caught:
        load(path, dtype="float16")
    assert "--dtype float32" in str(caught.value.hint)
    load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_weights_that_are_not_finite_are_refused_by_name(
    name: str, value: float, tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = copied(tiny_model("llama"), tmp_path / "model")
    edit_weights(path, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    with pytest.raises(ModelError, match=re.escape(name)):
        load(path)


@pytest.mark.parametrize("dropped", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_missing_tensor_is_not_initialized_randomly(
    dropped: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = copied(tiny_model("llama"), tmp_path / "model")
    edit_weights(path, lambda tensors: tensors.pop(dropped))
    with pytest.raises(ModelError, match=rf"\b1 missing.*{re.escape(dropped)}"):
        load(path)


def test_a_tensor_of_another_shape_is_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = copied(tiny_model("llama"), tmp_path / "model")
    edit_weights(path, lambda t: t.update({"model.norm.weight": torch.ones(47)}))
    with pytest.raises(ModelError, match=r"\b1 mismatched.*model\.norm\.weight"):
        load(path)


def test_tensors_that_the_model_does_not_have_are_told(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = copied(tiny_model("llama"), tmp_path / "model")
    edit_weights(path, lambda t: t.update({"extra.b": torch.ones(2), "extra.a": torch.ones(2)}))
    events: list[Event] = []
    model = load(path, events)
    notices = [e for e in events if isinstance(e, Notice) and e.kind == "warning"]
    assert [(n.subject, n.message[:9]) for n in notices] == [("extra.a", "2 tensors")]
    assert not [spec for spec in model.tensors if spec.name.startswith("extra")]


def test_types_are_kept_tensor_by_tensor(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A checkpoint in bfloat16 whose norms are float32."""

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(torch.float32 if "norm" in name else torch.bfloat16)

    path = edit_weights(copied(tiny_model("llama", tied=True), tmp_path / "model"), mix)
    model = load(path)
    assert {s.name: s.dtype for s in model.tensors} == {
        name: "F32" if "norm" in name else "BF16"
        for name in model.module.state_dict()
        if name != "lm_head.weight"
    }
    assert {spec.dtype for spec in model.layers} == {"BF16"}


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "48"},
        {"hidden_size": -1},
        {"num_attention_heads": 0},
        {"pad_token_id": 100_000},
        {"hidden_act": "no-such-activation"},
        {"model_type": "no-such-type"},
        {"model_type": None},
        {"rope_parameters": 3},
        {"quantization_config": {}},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 3},
        {"vocab_size": 301},
        {"architectures": ["BertForMaskedLM"], "model_type": "bert"},
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_refused(
    change: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = copied(tiny_model("llama"), tmp_path / "model")
    edit_config(path, lambda config: config.update(change))
    with pytest.raises(ModelError) as caught:
        load(path)
    assert not str(caught.value).rstrip().endswith(":")


def test_an_empty_quantization_config_is_none(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = copied(tiny_model("llama"), tmp_path / "model")
    edit_config(path, lambda config: config.update(quantization_config=None))
    model = load(path)
    assert not model.quantized
    assert same_model(model, load(tiny_model("llama")))


def test_a_directory_without_a_config(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = copied(tiny_model("llama"), tmp_path / "model")
    (path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        load(path)


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"\xff", b'{"added_tokens": [], "model": {"type": "none"}}', None],
    ids=str,
)
def test_without_its_tokenizer_a_model_loads_and_says_so(
    damage: bytes | None, tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = copied(tiny_model("llama"), tmp_path / "model")
    if damage is None:
        for file in path.glob("tokenizer*"):
            file.unlink()
    else:
        (path / "tokenizer.json").write_bytes(damage)
    events: list[Event] = []
    assert load(path, events).tokenizer is None
    told = [e for e in events if isinstance(e, Notice) and e.subject == "tokenizer"]
    assert [(n.kind, n.message[:17]) for n in told] == [("warning", "cannot be loaded:")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("LlamaForCausalLM", "causal-lm"),
        ("GPT2LMHeadModel", "causal-lm"),
        ("BertForMaskedLM", "masked-lm"),
        ("RobertaForSequenceClassification", "classifier"),
        ("MPNetModel", "encoder"),
    ],
)
def test_the_kind_comes_from_the_class_that_wrote_it(name: str, kind: str) -> None:
    assert detect_kind({"architectures": [name, "Other"]}, Path()) == kind


@pytest.mark.parametrize(
    "named",
    [None, [], [None], [3], 5, {}, "LlamaForCausalLM", ["T5ForConditionalGeneration"], ["Bert"]],
    ids=str,
)
def test_other_classes_are_refused(named: object) -> None:
    with pytest.raises(ModelError, match="there") as caught:
        detect_kind({"architectures": named}, Path("there"))
    assert "ForCausalLM" in str(caught.value.allowed)


def test_auto_runs_in_float32_on_a_cpu_and_as_stored_on_a_gpu() -> None:
    stored = {
        name: TensorSpec(name=name, dtype=dtype, shape=(count,))
        for name, dtype, count in [("a", "BF16", 60), ("b", "F32", 20), ("c", "I64", 99)]
    }
    assert pick_dtype("auto", torch.device("cpu"), stored) is torch.float32
    assert pick_dtype("auto", torch.device("cuda"), stored) is torch.bfloat16
    assert pick_dtype("auto", torch.device("cuda"), {}) is torch.float32
    assert pick_dtype("float16", torch.device("cpu"), stored) is torch.float16
    with pytest.raises(UsageError, match="'float64'"):
        pick_dtype("float64", torch.device("cpu"), stored)


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, name in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        assert pick_device("auto") == torch.device(name)
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="cuda:1"):
        pick_device("cuda:1")
    with pytest.raises(UsageError, match="'tpu9'"):
        pick_device("tpu9")


def test_a_loaded_model_cannot_be_trained_by_accident(tiny_model: TinyModel) -> None:
    model = load(tiny_model("bert"))
    assert not model.module.training
    assert not [p for p in model.module.parameters() if p.requires_grad]
    assert model.config.model_type == read_config(model.path)["model_type"]

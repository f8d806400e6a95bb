"""The trial model: the weights of `compress_model`, and a model that comes back as it was."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from cptq.allocation.cost import CostModel
from cptq.calibration import recorder, samples
from cptq.calibration.batches import Batch
from cptq.calibration.objective import choose_objective
from cptq.calibration.tokens import Calibration, build_calibration
from cptq.checkpoint.loader import load_model
from cptq.checkpoint.memory import BASE, Memory
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight, set_weight
from cptq.compression import blockwise
from cptq.compression.blockwise import compress_model
from cptq.compression.streams import measure_head_moment
from cptq.compression.trial_model import TrialModel
from cptq.config import RUNTIMES, CalibrationSettings, ModelSettings, Runtime, find_runtime
from cptq.layouts.pack_quantized import PACK_QUANTIZED
from cptq.layouts.packed import PACKED_LAYOUT
from cptq.pipeline.trial_model import build_trial_model, solve_choices
from cptq.types import Budget, Candidate, Event, LayerSpec, Plan, Progress
from tests.conftest import TinyModel
from tests.reference.sensitivity import random_calibration
from tests.unit.artifact.builders import load

pytestmark = pytest.mark.usefixtures("short_manual")
TEXT = CalibrationSettings(calibration="pydoc", samples=4, seqlen=64, batch_size=2)
WIDTHS = [Candidate(bits=b, group_size=16) for b in (2, 3, 4)] + [Candidate(bits=16)]


USUAL: dict[str, Any] = {"layout": PACK_QUANTIZED, "float16_scales": False}


def quiet(_event: Event) -> None: ...


def cost_of(model: LoadedModel) -> CostModel:
    return CostModel(model.units, model.tensors, PACK_QUANTIZED, find_runtime("transformers"))


def loaded(tiny_model: TinyModel, arch: str) -> tuple[LoadedModel, Calibration]:
    settings = ModelSettings(model=str(tiny_model(arch)))
    model = load_model(settings, quiet)
    return model, build_calibration(model, TEXT, settings, quiet)


def weights(model: LoadedModel) -> dict[str, torch.Tensor]:
    specs = [spec for unit in model.units for spec in unit.layers]
    return {spec.name: get_weight(model.linear(spec.name)).clone() for spec in specs}


def mixed(model: LoadedModel) -> dict[str, Candidate]:
    return {unit.name: WIDTHS[k % len(WIDTHS)] for k, unit in enumerate(model.units)}


def carried_out(
    model: LoadedModel,
    calibration: Calibration,
    choices: dict[str, Candidate],
    how: str,
    **options: Any,
) -> dict[str, torch.Tensor]:
    plan = Plan(
        model_fingerprint=model.fingerprint, budget=Budget(limit_bytes=0, asked="x"),
        allocator="x", metric=None, table_digest=None, choices=choices, predicted_bytes=0,
        predicted_loss=None,
    )  # fmt: skip
    compress_model(model, calibration, plan, compressor=how, emit=quiet, **options)
    return weights(model)


def grids(runtime: Runtime, asymmetric: bool) -> list[Candidate]:
    """Every width that a runtime takes, some on asymmetric grids or not."""
    taken = runtime.asymmetric if asymmetric else ()
    return [Candidate(bits=b, group_size=32, symmetric=b not in taken) for b in runtime.bits]


def record_hessians(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """{layer: H_II} that `compress_model` uses from now on, towards the dense weights."""
    used: dict[str, torch.Tensor] = {}
    real = blockwise.compress_module

    def recording(module: Any, spec: LayerSpec, H_II: torch.Tensor, *rest: Any, **more: Any) -> Any:
        used[spec.name] = H_II
        return real(module, spec, H_II, *rest, **(more | {"target_OI": None}))

    monkeypatch.setattr(blockwise, "compress_module", recording)
    return used


@pytest.mark.parametrize(
    ("runtime", "asymmetric"),
    [(name, grid) for name, r in RUNTIMES.items() for grid in ({False, bool(r.asymmetric)})],
)
@pytest.mark.parametrize(
    ("compressor", "dtype"),
    [
        ("gptq", torch.bfloat16),
        pytest.param("gptq", torch.float32, marks=pytest.mark.slow),
        pytest.param("nearest", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("nearest", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_the_weights_tried_are_those_shipped_for_every_runtime(
    tiny_model: TinyModel,
    monkeypatch: pytest.MonkeyPatch,
    runtime: str,
    asymmetric: bool,
    compressor: str,
    dtype: torch.dtype,
) -> None:
    """By the same compressor on the same Hessians, bit for bit."""
    program = RUNTIMES[runtime]
    wide: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
    if program.experts:
        wide |= {"moe_intermediate_size": 32}
    arch = "qwen3_moe" if program.experts else "llama"
    model = load(tiny_model(arch, dtype=dtype, **wide), experts=True)
    calibration, dense = random_calibration(model, rows=4, length=24), weights(model)
    widths, layout = grids(program, asymmetric), PACKED_LAYOUT if asymmetric else PACK_QUANTIZED
    options = {"layout": layout, "float16_scales": program.float16_scales}
    choices = {unit.name: widths[k % len(widths)] for k, unit in enumerate(model.units)}
    used = record_hessians(monkeypatch)
    shipped = carried_out(model, calibration, choices, compressor, **options)
    for name, W_OI in dense.items():
        set_weight(model.linear(name), W_OI)
    hessians = {unit.name: used[unit.layers[0].name] for unit in model.units}
    given = hessians if compressor == "gptq" else None
    bench = TrialModel(model, compressor, quiet, given, **options)
    with bench.restore_after():
        bench.apply_choices(choices)
        tried = weights(model)
    assert set(tried) == set(shipped)
    assert [name for name in tried if not torch.equal(tried[name], shipped[name])] == []


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_without_activations_it_is_compress_model_to_the_bit(
    tiny_model: TinyModel, arch: str
) -> None:
    model, calibration = loaded(tiny_model, arch)
    choices, dense = mixed(model), weights(model)
    bench = TrialModel(model, "nearest", quiet, **USUAL)
    with bench.restore_after():
        bench.apply_choices(choices)
        tried = weights(model)
    back = weights(model)
    assert all(torch.equal(back[name], dense[name]) for name in dense)
    done = carried_out(model, calibration, choices, "nearest")
    assert all(torch.equal(tried[name], done[name]) for name in done)


def test_the_way_to_a_choice_does_not_matter_and_errors_leave_a_dense_model(
    tiny_model: TinyModel,
) -> None:
    model, _ = loaded(tiny_model, "llama")
    dense, names = weights(model), [unit.name for unit in model.units]
    bench = TrialModel(model, "nearest", quiet, **USUAL)
    with bench.restore_after():
        for candidate in WIDTHS:
            bench.apply_choices(dict.fromkeys(names, candidate))
        again = weights(model)
        assert all(torch.equal(again[name], dense[name]) for name in dense)  # the last is dense
        bench.apply_choices(mixed(model))
        by_a_detour = weights(model)
    with bench.restore_after():
        bench.apply_choices(mixed(model))
        assert all(torch.equal(by_a_detour[n], w) for n, w in weights(model).items())
    with pytest.raises(KeyError), bench.restore_after():
        bench.apply_choices(mixed(model) | {"no such unit": WIDTHS[0]})
    assert all(torch.equal(dense[n], w) for n, w in weights(model).items())


def test_with_activations_the_first_block_is_that_of_compress_model(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later blocks differ: there the errors of those before are not seen.

    Equal Hessians: all tokens go in, also where other passes stop earlier.
    """
    monkeypatch.setattr(samples, "PASS_TOKENS", 64)
    model, calibration = loaded(tiny_model, "llama")
    choices = dict.fromkeys((unit.name for unit in model.units), Candidate(bits=3, group_size=16))
    bench = build_trial_model(
        model, calibration, "gptq", cost_of(model), choices.values(), seed=0, emit=quiet
    )
    with bench.restore_after():
        bench.apply_choices(choices)
        tried = weights(model)
    done = carried_out(model, calibration, choices, "gptq")
    first = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(tried[first], done[first], rtol=1e-5, atol=1e-6)
    last = "model.layers.1.mlp.down_proj"
    assert not torch.equal(tried[last], done[last])


def test_long_work_is_told_and_done_once(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cptq.compression.trial_model.MANY", 3)
    model, _ = loaded(tiny_model, "llama")
    heard: list[Event] = []
    bench = TrialModel(model, "nearest", heard.append, **USUAL)
    every = dict.fromkeys((unit.name for unit in model.units), WIDTHS[0])
    with bench.restore_after():
        bench.apply_choices(every)
        told = len(heard)
        bench.apply_choices(dict.fromkeys(every, WIDTHS[-1]))
        bench.apply_choices(every)
    assert told == len(model.units) + 1
    assert len(heard) == told
    assert all(isinstance(event, Progress) for event in heard)


@pytest.mark.parametrize("memory", [None, Memory(total=BASE)], ids=["whole", "by block"])
def test_choices_are_solved_on_the_way_as_one_by_one(
    memory: Memory | None, tiny_model: TinyModel
) -> None:
    settings = ModelSettings(model=str(tiny_model("llama", tied=True)))
    model = load_model(settings, quiet, memory=memory)
    text = build_calibration(model, TEXT, settings, quiet)
    cost = CostModel(model.all_units, model.tensors, PACKED_LAYOUT, find_runtime("cptq"))
    dense = weights(model)
    names = [unit.name for unit in cost.units]
    choices = [dict.fromkeys(names, WIDTHS[2]), {n: WIDTHS[1 + k % 3] for k, n in enumerate(names)}]
    args: Any = (model, text, "gptaq", cost)
    found = solve_choices(*args, choices, seed=0, emit=quiet)
    one_by_one = build_trial_model(*args, WIDTHS, seed=0, emit=quiet)
    for choice in choices:
        for unit in (unit for unit in cost.units if not choice[unit.name].dense):
            expected = one_by_one.weights(unit, choice[unit.name])
            for name, W_OI in found.weights(unit, choice[unit.name]).items():
                assert torch.equal(W_OI, expected[name])
    with found.restore_after():
        found.apply_choices(choices[0])
        assert all(not torch.equal(dense[name], W_OI) for name, W_OI in weights(model).items())
    assert all(torch.equal(dense[name], W_OI) for name, W_OI in weights(model).items())


def test_a_head_is_tried_on_its_own_inputs_where_rows_are_padded(tiny_model: TinyModel) -> None:
    model = load(tiny_model("llama", tied=False))
    batches = [pad_last(batch, count) for count, batch in enumerate(random_batches(model, 5))]
    text = replace(random_calibration(model), batches=batches)
    cost = CostModel(model.all_units, model.tensors, PACKED_LAYOUT, find_runtime("cptq"))
    choice = dict.fromkeys((unit.name for unit in cost.units), WIDTHS[1])
    found = solve_choices(model, text, "gptq", cost, [choice], seed=0, emit=quiet)
    (head,) = (unit for unit in model.vocabulary if unit.role == "head")
    expected = TrialModel(model, "gptq", quiet, **(USUAL | {"layout": PACKED_LAYOUT}))
    expected.take_head_moment(measure_head_moment(model, batches))
    W_OI = expected.weights(head, WIDTHS[1])["lm_head"]
    assert torch.equal(found.weights(head, WIDTHS[1])["lm_head"], W_OI)


def random_batches(model: LoadedModel, count: int) -> list[Batch]:
    """Batches of two rows each, all different."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    rows = [torch.randint(3, vocabulary, (2, 24), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows]


def pad_last(batch: Batch, count: int) -> Batch:
    """Say that the last 4 * count positions of the second row are padding."""
    mask = batch["attention_mask"].clone()
    mask[1, mask.shape[1] - 4 * count :] = 0
    return batch | {"attention_mask": mask}


def test_every_width_is_tried_on_its_moment(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = loaded(tiny_model, "llama")
    narrow = partial(samples.sample_blocks, model, text.batches)
    widest = max(unit.layers[0].shape[1] for unit in model.units)
    asked: list[int] = []

    def record(*args: Any, **options: Any) -> samples.SamplePass:
        asked.append(options["features"])
        return samples.sample_moments(*args, **options)

    monkeypatch.setattr("cptq.pipeline.trial_model.sample_moments", record)
    choice = dict.fromkeys((unit.name for unit in model.units), WIDTHS[1])
    solve_choices(model, text, "gptq", cost_of(model), [choice], seed=0, emit=quiet)
    assert asked == [widest]
    objective = choose_objective(model.kind, model.config)
    for features in (widest, widest - 1):
        request = recorder.SampleRequest(moments=True, features=features)
        found = {
            name: layer.moment is not None
            for part in narrow(objective, request, seed=0, emit=quiet)
            for name, layer in part.layers.items()
        }
        widths = {spec.name: spec.shape[1] for unit in model.units for spec in unit.layers}
        assert found == {name: widths[name] <= features for name in found}

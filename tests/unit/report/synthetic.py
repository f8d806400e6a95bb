"""A synthetic run with the shape of a real one: 30 blocks of 7 linears, 4 metrics, a plan."""

from __future__ import annotations

import random
from dataclasses import replace
from math import exp

from cptq.report import ModelFacts, Summary, VerificationFacts
from cptq.report.comparison import ComparedModel, ModelComparison
from cptq.report.summary import FrontPoint
from cptq.types import (
    Budget,
    CalibrationRecord,
    Candidate,
    EvalResult,
    Figure,
    GuardMeasure,
    GuardQuality,
    LayerResult,
    LayerSpec,
    ModelSpeed,
    Notice,
    PairedDifference,
    Plan,
    SensitivityTable,
    SizeReport,
    SpeedReport,
    Unit,
    join_results,
)

ROLES = {
    "self_attn.q_proj": ("q", (576, 576), "qkv"),
    "self_attn.k_proj": ("k", (192, 576), "qkv"),
    "self_attn.v_proj": ("v", (192, 576), "qkv"),
    "self_attn.o_proj": ("o", (576, 576), None),
    "mlp.gate_proj": ("gate", (1536, 576), "gate_up"),
    "mlp.up_proj": ("up", (1536, 576), "gate_up"),
    "mlp.down_proj": ("down", (576, 1536), None),
}
WEIGHT = {"qkv": 1.0, "o": 0.4, "gate_up": 1.6, "down": 2.8}
BITS = (2, 3, 4, 5, 6, 8, 16)
CANDIDATES = tuple(Candidate(bits=b, group_size=64 if b < 16 else 0) for b in BITS)


def make_layer(block: int, name: str) -> LayerSpec:
    role, shape, fused = ROLES[name]
    return LayerSpec(
        name=f"model.layers.{block}.{name}",
        block=block,
        role=role,
        kind="linear",
        shape=shape,
        dtype="BF16",
        fused=f"model.layers.{block}.{fused}" if fused else None,
    )


def make_units(blocks: int) -> tuple[Unit, ...]:
    """Make units with q/k/v and gate/up fused, as `cptq.checkpoint` does."""
    found: dict[str, list[LayerSpec]] = {}
    for block in range(blocks):
        for name in ROLES:
            spec = make_layer(block, name)
            found.setdefault(spec.fused or spec.name, []).append(spec)
    return tuple(
        Unit(name=name, block=rows[0].block, role=_role(rows), layers=tuple(rows))
        for name, rows in found.items()
    )


def _role(rows: list[LayerSpec]) -> str:
    return (rows[0].fused or rows[0].role).rpartition(".")[2]


def make_table(metric: str, rows: tuple[Unit, ...], spread: float, seed: int) -> SensitivityTable:
    """Make scores that fall with depth, rise at both ends, and range over `spread` powers of e."""
    rng = random.Random(seed)
    last = max(unit.block or 0 for unit in rows) or 1
    per_unit = {}
    for unit in rows:
        depth = (unit.block or 0) / last
        bowl = (2 * depth - 1) ** 4
        per_unit[unit.name] = WEIGHT[unit.role] * exp(
            spread * (bowl - 0.4 * depth + rng.gauss(0, 0.12))
        )
    if spread < 1:
        top = max(per_unit.values())
        per_unit = {name: 0.6 * score / top for name, score in per_unit.items()}
    scores = {
        name: {c: 0.0 if c.dense else score * 4.0 ** (4 - c.bits) for c in CANDIDATES}
        for name, score in per_unit.items()
    }
    per_block: dict[int, float] = {}
    for unit in rows:
        per_block[unit.block or 0] = per_block.get(unit.block or 0, 0.0) + per_unit[unit.name]
    return SensitivityTable(
        metric=metric,
        score_unit={"cca": "1 - mean rho", "pruning": "nats per token"}.get(
            metric, "nats per sample"
        ),
        scores=scores,
        per_unit=per_unit,
        per_block=per_block,
        model_fingerprint="f" * 64,
        calibration_fingerprint="c" * 64,
        seed=0,
        tokens=32_768,
        seconds=21.4 + seed,
    )


def make_choices(scores: SensitivityTable) -> dict[str, Candidate]:
    """Choose wider candidates for more sensitive units."""
    ranked = sorted(scores.per_unit, key=lambda name: -scores.per_unit[name])
    shares = ((0.05, 8), (0.15, 6), (0.35, 5), (0.7, 4), (0.93, 3), (1.01, 2))
    wide = {
        name: next(bits for share, bits in shares if (rank + 0.5) / len(ranked) < share)
        for rank, name in enumerate(ranked)
    }
    return {name: Candidate(bits=wide[name], group_size=64) for name in scores.per_unit}


def make_layer_result(spec: LayerSpec, candidate: Candidate, rng: random.Random) -> LayerResult:
    error = 4.0 ** (-candidate.bits) * exp(rng.gauss(0.9, 0.3))
    return LayerResult(
        name=spec.name,
        candidate=candidate,
        group_size=64,
        nbytes=spec.numel * candidate.bits // 8 + spec.numel // 32,
        weight_error=error,
        output_error=error * exp(rng.gauss(-1.0, 0.4)),
        seconds=0.8,
        notes=("damping raised to 0.1",) if spec.name.endswith("3.mlp.down_proj") else (),
    )


def make_results(scale: float, accuracy: float) -> tuple[EvalResult, ...]:
    common = {"version": 1, "samples": 10, "seconds": 61.0, "data_sha256": "ab" * 32}
    return (
        EvalResult(
            task="wikitext", metric="token_perplexity", value=27.05 * scale, unit="perplexity",
            higher_is_better=False, seqlen=2048, tokens=20_480,
            data_source="wikitext-2-raw", **common,
        ),
        EvalResult(
            task="wikitext", metric="bits_per_byte", value=1.021 * scale**0.2, unit="bits per byte",
            higher_is_better=False, seqlen=2048, tokens=20_480,
            data_source="wikitext-2-raw", **common,
        ),
        EvalResult(
            task="glue/sst2", metric="accuracy", value=accuracy, unit="share", stderr=0.0101,
            higher_is_better=True, data_source="SST-2 dev", **common,
        ),
    )  # fmt: skip


def make_notices() -> tuple[Notice, ...]:
    return (
        Notice(kind="skipped", subject="model.embed_tokens", message="embeddings stay dense"),
        Notice(kind="skipped", subject="lm_head", message="tied to model.embed_tokens"),
        Notice(
            kind="fallback",
            subject="model.layers.13.mlp.down_proj",
            message="the Hessian was not positive definite at damping 0.01; 0.1 was used",
        ),
        Notice(kind="info", subject="calibration", message="wikitext found in the data directory"),
    )


def make_quality(blocks: int) -> GuardQuality:
    """Make what a language model lost; a share, a divergence and a perplexity of both models."""
    return GuardQuality(
        measures=(
            GuardMeasure(
                name="KL", unit="nats per token", value=0.05, stderr=0.002,
                higher_is_better=False, interval=(0.046, 0.054),
            ),
            GuardMeasure(
                name="top-1 agreement", unit="of tokens", value=0.91, stderr=0.01,
                higher_is_better=True, interval=(0.89, 0.93),
            ),
            GuardMeasure(
                name="perplexity", unit="per token", value=21.5, stderr=1.2,
                higher_is_better=False, interval=(1.1, 1.9), dense=20.0, dense_stderr=1.1,
            ),
        ),
        source="wikitext", tokens=4096, rows=2048, samples=8, sample_name="window",
        chose_plan=True, depth=tuple(0.001 * (index + 1) for index in range(blocks + 1)),
    )  # fmt: skip


def make_speed() -> SpeedReport:
    """Make what compress measures of a model, beside stock transformers' memory."""
    return SpeedReport(
        command="cptq bench smollm2-135m out",
        models=(
            make_model_speed("dense", 538_060_032, "generate", 250.0, 12.0),
            make_model_speed("compressed, in cptq", 112_000_000, "own loop", 400.0, 60.0),
            ModelSpeed(name="compressed, in transformers", weight_bytes=538_060_032),
        ),
        prompt_tokens=64, new_tokens=9, threads=2, device="cpu", dtype="float32",
    )  # fmt: skip


def make_model_speed(name: str, nbytes: int, way: str, prefill: float, decode: float) -> ModelSpeed:
    figures = (
        Figure(name="prefill", values=(prefill, prefill * 1.02, prefill * 0.98), batch_size=1),
        Figure(name="decode", values=(decode, decode * 1.05, decode * 0.95), batch_size=1),
    )
    return ModelSpeed(name=name, weight_bytes=nbytes, way=way, figures=figures)


def make_front() -> tuple[FrontPoint, ...]:
    """Make the front of a knapsack that beats the baseline a little at every size."""
    sizes = [70_000_000, 90_000_000, 111_998_320, 140_000_000]
    return tuple(
        FrontPoint(nbytes=size, bits=size / 25e6, loss=4e6 / size, uniform=6e6 / size)
        for size in sizes
    )


def make_summary(
    blocks: int = 30, command: str = "compress", source: str = "smollm2-135m"
) -> Summary:
    """Make the summary of a compress run; equal arguments give equal values."""
    rows, rng = make_units(blocks), random.Random(7)
    spreads = {"output": 3.2, "taylor": 4.0, "cca": 0.7, "pruning": 2.2}
    tables = {
        metric: make_table(metric, rows, spread, seed)
        for seed, (metric, spread) in enumerate(spreads.items())
    }
    chosen = make_choices(tables["output"])
    head = LayerSpec(
        name="lm_head", block=None, role="head", kind="head", shape=(49152, 576), dtype="BF16",
        tied_to="model.embed_tokens", compressible=False,
    )  # fmt: skip
    embedding = LayerSpec(
        name="model.embed_tokens", block=None, role="embedding", kind="embedding",
        shape=(49152, 576), dtype="BF16", compressible=False, reason="embeddings stay dense",
    )  # fmt: skip
    linears = [spec for unit in rows for spec in unit.layers]
    wide = {spec.name: chosen[unit.name] for unit in rows for spec in unit.layers}
    budget = Budget(limit_bytes=112_000_000, asked="4bit")
    return Summary(
        command=command,
        command_line=f"cptq {command} {source} --target 4bit",
        model=ModelFacts(
            source=source, kind="causal-lm", family="llama", parameters=134_515_008,
            dense_bytes=269_060_552, fingerprint="f" * 64, blocks=blocks, dtype="BF16",
        ),
        versions={"cptq": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        settings={"model": source, "target": "4bit", "bits": list(BITS), "token": None},
        device="cpu",
        dtype="float32",
        created="2026-11-24 10:00 UTC",
        layers=(embedding, *linears, head),
        units=rows,
        candidates=CANDIDATES,
        calibration=CalibrationRecord(
            source="wikitext", origin="wikitext-103/wiki.valid.tokens", samples=64, seqlen=512,
            tokens=32_768, seed=0, fingerprint="c" * 64, text_sha256="d" * 64,
        ),
        sensitivity=tables,
        budget=budget,
        plan=Plan(
            model_fingerprint="f" * 64, budget=budget, allocator="knapsack", metric="output",
            table_digest=tables["output"].digest, choices=chosen, predicted_bytes=111_998_320,
            predicted_loss=0.1834,
        ),
        size=SizeReport(
            file_bytes=111_998_320, compressible_bytes=55_388_160,
            dense_file_bytes=269_060_552, nominal_bits=4.0, effective_bits=4.25, file_bits=6.66,
        ),
        results=tuple(make_layer_result(spec, wide[spec.name], rng) for spec in linears),
        front=make_front(),
        quality=make_quality(blocks),
        speed=make_speed(),
        verification=VerificationFacts(max_abs_difference=0.0, seconds=6.2),
        comparison=join_results(make_results(1.18, 0.9048), make_results(1.0, 0.9106)),
        baseline_source=source,
        notices=make_notices(),
        timings={"load": 1.9, "calibrate": 0.7, "measure": 84.0, "compress": 190.0, "verify": 6.2},
    )  # fmt: skip


DIFFERENCE = PairedDifference(
    task="wikitext",
    version=1,
    metric="perplexity",
    higher_is_better=False,
    difference=1.5,
    interval=(1.1, 1.9),
    level=0.95,
    p_value=0.0004,
    samples=30,
    method="paired bootstrap",
)


def make_result(
    task: str, metric: str, value: float, higher: bool = False, stderr: float | None = None
) -> EvalResult:
    return EvalResult(
        task=task, version=1, metric=metric, value=value, unit="u", higher_is_better=higher,
        samples=10, seconds=1, stderr=stderr,
    )  # fmt: skip


def make_model(name: str, nbytes: int | None, value: float, *more: EvalResult) -> ComparedModel:
    """Make a model of a million weights with a perplexity."""
    return ComparedModel(
        name=name, source=f"/models/{name}", kind="causal-lm", parameters=1_000_000,
        weight_bytes=nbytes, effective_bits=4.25,
        results=(make_result("wikitext", "perplexity", value, stderr=0.2), *more),
    )  # fmt: skip


def make_comparison(*models: ComparedModel) -> ModelComparison:
    """Compare models by perplexity; by default a dense one and three compressed ones."""
    speed = make_result("speed", "decode", 12.5, higher=True)
    models = models or (
        make_model("dense", 2_000_000, 20.0, speed),
        replace(make_model("four", 600_000, 21.5), paired=(DIFFERENCE,)),
        make_model("worse", 700_000, 22.0),
        make_model("three<&>", 500_000, 30.0),
    )
    return ModelComparison(
        command_line="cptq compare", models=models, quality=("wikitext", "perplexity")
    )

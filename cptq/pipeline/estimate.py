"""`cptq compress --dry-run`: what a run would take, told without measuring anything.

Model, text, search space and budget are loaded and checked as for a run; nothing is written, and
an output that exists is no matter. Memory and disk are counted. Time is scaled from a probe:

    pass      one block on the first batch, t_p per position and block
    sum       second moment of the widest input, t_m per position and input^2
    rounding  factorization and rounding of a layer, t_r per in^3 + out in^2

    a plan carried out on x, judged on y:
        t_p B (d T(x) + p(x) T(x) + p(y) T(y)) + t_m sum_units in^2 ((1 + d) T(x) + T(y))
        + t_r sum_layers (in^3 + out in^2)

with T positions and B blocks. Corrected, d = 1/2, as the dense stream takes half of the text, and
p = 1, or one more than the units of a block where memory does not hold what waits in it; else d = 0
and p = 2 (`compression.streams`).

Limits: one batch on a machine that may do other work meanwhile. A layer wider than `PROBE_WIDTH` is
timed in part and scaled. What is left out is said in `TimeFacts.left_out`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cptq.allocation import BLIND
from cptq.allocation.problem import report_refused
from cptq.calibration.batches import Batch
from cptq.calibration.replay import BlockReplay
from cptq.calibration.samples import PASS_TOKENS
from cptq.checkpoint.files import find_pickle_files, find_weight_files
from cptq.checkpoint.model import LoadedModel
from cptq.compression import COMPRESSORS, CORRECTING
from cptq.compression.layer import build_layer_problem, solve_layer_problem
from cptq.compression.streams import DENSE_SHARE, can_wait
from cptq.config import CompressSettings
from cptq.numerics.asymmetric_target import compute_asymmetric_targets
from cptq.numerics.hessian import SecondMoment
from cptq.pipeline.compress import make_plan
from cptq.pipeline.disk import count_disk
from cptq.pipeline.inputs import CompressInputs, load_inputs
from cptq.pipeline.memory_shares import describe_memory
from cptq.pipeline.plan_check import list_trial_texts
from cptq.pipeline.plan_view import view_plans
from cptq.pipeline.recorder import Recorder
from cptq.pipeline.run_directory import find_run_directory
from cptq.pipeline.spilled import count_positions
from cptq.pipeline.summarize import describe_model
from cptq.report.estimate import Estimate, TimeFacts
from cptq.report.plans import PlanView
from cptq.sensitivity import METRICS
from cptq.types import Candidate, Emit, LayerSpec, Plan, Progress

#: widest layer that is probed
PROBE_WIDTH = 2048
#: passes' worth of a sampling pass: forward, forward again, and back, which takes twice as long
GRADIENT_PASSES = 4


def estimate(settings: CompressSettings, emit: Emit) -> Estimate:
    """Return what `compress` would do with these settings; measure and write nothing.

    Raises:
        CptqError: what makes the run impossible, but for the output and the disk.
    """
    recorder = Recorder(emit)
    assert settings.out is not None, "check_settings fills it in"
    inputs = load_inputs(settings, recorder, writes=False, folder=find_run_directory(settings.out))
    model, cost = inputs.model, inputs.space.cost
    if inputs.ledger is not None:
        report_refused(inputs.ledger, inputs.space.candidates, recorder)
    outer = {unit.name for unit in model.vocabulary}
    dense = [n for n in recorder.notices if n.kind == "skipped" or n.subject in outer]
    recorder(Progress(stage="estimate", done=0, total=None, message="time a block"))
    probe = run_probe(inputs)
    view = _view_plan(inputs, probe, recorder)
    counted = inputs.ledger or inputs.plan
    assert counted is not None, "a plan of --plan, or the ledger that one is made with"
    return Estimate(
        model=describe_model(model),
        layers=sum(len(unit.layers) for unit in cost.units),
        units=model.all_units,
        file_bytes=_count_file_bytes(model),
        budget=counted.budget,
        runtime=inputs.runtime.name,
        form=inputs.space.form,
        shard_bytes=cost.shard_bytes,
        memory=describe_memory(model),
        disk=count_disk(inputs),
        time=estimate_time(inputs, probe),
        dense=tuple(dense),
        view=view,
        notices=tuple(recorder.notices),
    )


def _view_plan(inputs: CompressInputs, probe: Probe, recorder: Recorder) -> PlanView | None:
    """Return the plan where no measurement is needed for it, before --refine; None else."""
    settings = inputs.settings
    if inputs.plan is None and not inputs.tables and settings.allocator not in BLIND:
        return None
    unrefined = replace(inputs, settings=replace(settings, refine=0))
    plan = make_plan(unrefined, inputs.tables, recorder)
    return view_plans(
        inputs, [plan], inputs.tables, lambda p: time_plan(inputs, probe, p), recorder
    )


def _count_file_bytes(model: LoadedModel) -> int:
    files = find_weight_files(model.path) or find_pickle_files(model.path)
    return sum(file.stat().st_size for file in files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Measured seconds, and the work that they were for.

    `positions` went through one block in `forward` seconds; `moment` is the sum of as many rows of
    `width` inputs, `rounding` the compression of a layer of (`out`, `width`).
    """

    positions: int
    width: int
    out: int
    forward: float
    moment: float
    rounding: float

    @property
    def per_position(self) -> float:
        """Seconds of a block per position."""
        return self.forward / self.positions

    @property
    def per_square(self) -> float:
        """Seconds of a second moment per position and input^2."""
        return self.moment / (self.positions * self.width**2)

    @property
    def per_cube(self) -> float:
        """Seconds of a compression per in^3 + out in^2."""
        return self.rounding / _count_work(self.out, self.width)


def time_plan(inputs: CompressInputs, probe: Probe, plan: Plan) -> float:
    """Return the seconds that `compress --plan` takes, without loading and writing."""
    own = replace(inputs, plan=plan)
    return _estimate_plan(own, probe, inputs.calibration.batches, inputs.held_out.errors)


def estimate_time(inputs: CompressInputs, probe: Probe) -> TimeFacts:
    """Return the seconds of the stages of a run, scaled from a probe."""
    settings, batches = inputs.settings, inputs.calibration.batches
    stages = {}
    if inputs.measures:
        stages[f"measurement by {settings.metric}"] = _estimate_measurement(inputs, probe)
    if inputs.compare_with_baseline:
        stages["plan check, at most"] = _estimate_check(inputs, probe)
    if settings.evaluate:
        positions = count_positions(inputs.held_out.judge) * len(inputs.model.blocks)
        stages["quality on held-out text"] = (
            (1 if inputs.compare_with_baseline else 2) * positions * probe.per_position
        )
    stages["compression"] = _estimate_plan(inputs, probe, batches, inputs.held_out.errors)
    return TimeFacts(
        stages=stages,
        probe={
            f"one block on {probe.positions:,} positions": probe.forward,
            f"their second moment of {probe.width:,} inputs": probe.moment,
            f"factorization and rounding of {probe.out:,} x {probe.width:,} weights": (
                probe.rounding
            ),
        },
        counted="passes through the blocks, second moments and the rounding of layers",
        left_out=_list_left_out(inputs),
    )


def _estimate_check(inputs: CompressInputs, probe: Probe) -> float:
    """Return the seconds of --check-uniform where no trial before the last one is plain.

    As if the two plans agreed in no unit.
    """
    model, texts = inputs.model, list_trial_texts(inputs).values()
    judged = (1 + 2 * len(texts)) * count_positions(inputs.held_out.judge)
    passed = sum(map(count_positions, texts))
    squares = sum(unit.layers[0].shape[1] ** 2 for unit in model.units)
    cubes = sum(_count_work(*layer.shape) for unit in model.units for layer in unit.layers)
    return (
        (judged + passed) * len(model.blocks) * probe.per_position
        + passed * squares * probe.per_square
        + 2 * len(texts) * cubes * probe.per_cube
    )


def _list_left_out(inputs: CompressInputs) -> str:
    settings = inputs.settings
    parts = ["loading", "the output head", "writing and the check of what is written"]
    if inputs.measures:
        parts.append("what --metric does beside a pass with gradients")
    parts += ["--refine"] if settings.refine else []
    parts += [f"--tune (at most {settings.tune_minutes} minutes)"] if settings.tune else []
    return ", ".join(parts)


def _estimate_measurement(inputs: CompressInputs, probe: Probe) -> float:
    """Return the seconds of a sampling pass; 0 for a metric of the weights alone."""
    needs = METRICS.get(inputs.settings.metric).needs
    if not needs.text:
        return 0.0
    positions = min(PASS_TOKENS, count_positions(inputs.calibration.batches))
    passes = GRADIENT_PASSES if needs.samples is None or needs.samples.gradients else 1
    seconds = passes * positions * len(inputs.model.blocks) * probe.per_position
    widths = [unit.layers[0].shape[1] for unit in inputs.model.units]
    seconds += positions * probe.per_square * sum(width**2 for width in widths)
    return seconds + probe.per_cube * sum(width**3 for width in widths)


def _estimate_plan(
    inputs: CompressInputs, probe: Probe, batches: Sequence[Batch], judged: Sequence[Batch]
) -> float:
    """Return the seconds of a plan that is carried out; see the head of this module."""
    model = inputs.model
    corrects = inputs.settings.compressor in CORRECTING
    own, other = count_positions(batches), count_positions(judged)
    extra = DENSE_SHARE * own if corrects else 0.0
    through = extra + _count_passes(inputs, batches) * own + _count_passes(inputs, judged) * other
    squares = sum(unit.layers[0].shape[1] ** 2 for unit in model.units)
    dense = {name for name, c in (inputs.plan.choices if inputs.plan else {}).items() if c.dense}
    packed = (unit for unit in model.units if unit.name not in dense)
    cubes = sum(_count_work(*layer.shape) for unit in packed for layer in unit.layers)
    return (
        through * len(model.blocks) * probe.per_position
        + (own + other + extra) * squares * probe.per_square
        + cubes * probe.per_cube
    )


def _count_passes(inputs: CompressInputs, batches: Sequence[Batch]) -> float:
    """Return how often a text passes a block that is compressed on it (`compression.streams`)."""
    model = inputs.model
    if inputs.settings.compressor not in CORRECTING:
        return 2.0
    if can_wait(model, batches):
        return 1.0
    return len(model.units) / len(model.blocks) + 1


def _count_work(out: int, inputs: int) -> int:
    return inputs**3 + out * inputs**2


@torch.no_grad()
def run_probe(inputs: CompressInputs) -> Probe:
    """Time one block, one second moment and one layer; each twice, the first time to warm up."""
    model = inputs.model
    replay = BlockReplay(model, [inputs.calibration.batches[0]])
    hidden = replay.embed(0)
    positions = hidden.shape[:-1].numel()
    spec = max((x for unit in model.units for x in unit.layers), key=lambda x: x.shape[1])
    width = min(spec.shape[1], PROBE_WIDTH)
    out = min(spec.shape[0], width)
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(positions, width, generator=generator).to(model.device)
    moment = SecondMoment(width, device=model.device)
    seconds = _time(lambda: moment.add(x_TI), model.device)
    W_OI = torch.randn(out, width, generator=generator).to(model.device)
    part = replace(spec, shape=(out, width))
    compress = _prepare_rounding(inputs, part, W_OI, moment.mean_II)
    return Probe(
        positions=positions,
        width=width,
        out=out,
        forward=_time(lambda: replay.run(0, hidden, 0), model.device),
        moment=seconds,
        rounding=_time(compress, model.device),
    )


def _prepare_rounding(
    inputs: CompressInputs, spec: LayerSpec, W_OI: Tensor, H_II: Tensor
) -> Callable[[], object]:
    """Return what compresses a layer as the run does, at about 4 bits."""
    settings = inputs.settings
    method = COMPRESSORS.get(settings.compressor)
    packed = [c for c in inputs.space.candidates if not c.dense]
    usual = min(packed, key=lambda c: abs(c.bits - 4)) if packed else Candidate(bits=4)
    # every table of levels has 4 bits
    candidate = Candidate(bits=4, group_size=usual.group_size, levels=usual.levels)

    def compress() -> object:
        target_OI = W_OI
        if settings.compressor in CORRECTING:
            (target_OI,) = compute_asymmetric_targets([W_OI], H_II, H_II)
        return solve_layer_problem(build_layer_problem(spec, target_OI, H_II, candidate), method)

    return compress


def _time(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call that has been made once before."""
    run()
    _wait(device)
    began = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Load what `analyze` and `compress` work on: a dense model, text, candidates, a budget.

`load_inputs` collects all of it for `compress` into one frozen value. Whatever can be refused (a
target out of reach, a foreign plan or table, an output that exists, a full disk) is refused here,
before anything is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cptq.allocation import BLIND
from cptq.allocation.constraints import apply_constraints, parse_constraints
from cptq.allocation.cost import CostModel, explain_layer_refusal
from cptq.allocation.ledger import Ledger
from cptq.allocation.targets import resolve_target
from cptq.artifact.atomic import check_output, check_space
from cptq.artifact.content import build_content
from cptq.artifact.formats import FORMATS
from cptq.artifact.formats.gguf import measure_sizes
from cptq.artifact.hub import check_push
from cptq.calibration.batches import Batch
from cptq.calibration.holdout import count_part_rows, split_parts
from cptq.calibration.tokens import Calibration, build_calibration
from cptq.checkpoint.loader import load_model
from cptq.checkpoint.memory import choose_memory
from cptq.checkpoint.model import LoadedModel
from cptq.config import (
    RUNTIMES,
    AnalyzeSettings,
    CompressSettings,
    Runtime,
    find_runtime,
    parse_max_memory,
    parse_shard_size,
)
from cptq.layouts import Layout
from cptq.layouts.activations import RuledLayout
from cptq.layouts.gguf import GGUF_LAYOUT
from cptq.layouts.safetensors_header import SHARD_BYTES
from cptq.pipeline.activations import list_rules
from cptq.pipeline.candidates import (
    build_candidates,
    check_of_use,
    list_asymmetric_widths,
    offer_vocabulary,
)
from cptq.pipeline.files import check_covers, fill_in_scales, fit_plan, read_table
from cptq.pipeline.larger import refuse_larger
from cptq.pipeline.load_check import check_loadable
from cptq.pipeline.memory_shares import report_memory
from cptq.pipeline.recorder import Recorder
from cptq.sensitivity.prepare import check_units
from cptq.types import Candidate, Emit, Notice, Plan, Progress, SensitivityTable, Unit

DEFAULT_TARGET = "4bit"
#: parts of text that are held out, also for a single use: a judge asked once can read more
LEAST_PARTS = 2
#: batches of held-out text (of `MICRO_TOKENS` tokens) that output errors are measured on: what they
#: cost is that share of the passes over the calibration text
JUDGED_BATCHES = 4
#: fewest held-out rows that can judge
LEAST_CHECK_ROWS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """What each unit may get, and what that costs in the file to be written.

    `candidates` are those that the options name, `options` {unit: those left by --pin, --min-bits,
    --max-bits and --embedding-bits}. `form` names the file format. `rules`: {linear: label
    of its rule of activation sparsity}.
    """

    candidates: tuple[Candidate, ...]
    options: Mapping[str, tuple[Candidate, ...]]
    form: str
    cost: CostModel
    rules: Mapping[str, str] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        """The tensors that the file format makes of a layer."""
        return _find_layout(self.form, self.rules)

    def list_vocabulary_options(self, model: LoadedModel) -> dict[str, tuple[Candidate, ...]]:
        """Return what the units of the vocabulary may get, of those that the runtime holds."""
        names = [unit.name for unit in model.vocabulary if unit.name in self.options]
        return {name: self.cost.options(name, self.options[name]) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOutText:
    """Batches of text that does not calibrate, by use; empty where there is no use, or no text.

    `search` chooses between plans of --refine, `guard` confirms its choice, `judge` measures what
    is reported: output errors, how the plan compares with the baseline plan, and what --tune
    brings, whose states `tune` chooses between.
    """

    search: Sequence[Batch] = ()
    guard: Sequence[Batch] = ()
    tune: Sequence[Batch] = ()
    judge: Sequence[Batch] = ()

    @property
    def errors(self) -> Sequence[Batch]:
        """Return what output errors are measured on, which has to pass all blocks."""
        return self.judge[:JUDGED_BATCHES]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CompressInputs:
    """What `compress` works on. `plan` is that of --plan, `tables` that of --sensitivity.

    `ledger` counts the options of the units against the target; None with a `plan`, whose bytes
    are checked on their own. `need`: the most bytes that the file can take.
    `compare_with_baseline`: --check-uniform applies, as the plan will be made from scores.
    """

    settings: CompressSettings
    runtime: Runtime
    model: LoadedModel
    space: SearchSpace
    ledger: Ledger | None
    plan: Plan | None
    tables: Mapping[str, SensitivityTable]
    out: Path
    need: int
    calibration: Calibration
    held_out: HeldOutText
    compare_with_baseline: bool

    @property
    def measures(self) -> bool:
        """Whether scores are measured: the plan needs some, and none are given."""
        given = self.plan is not None or self.settings.sensitivity is not None
        return not given and self.settings.allocator not in BLIND

    @property
    def scores_vocabulary(self) -> bool:
        """Whether a unit outside the blocks may get other than one width."""
        return bool(self.space.list_vocabulary_options(self.model))


def load_inputs(
    settings: CompressSettings,
    recorder: Recorder,
    *,
    writes: bool = True,
    folder: Path | None = None,
    processes: int = 1,
) -> CompressInputs:
    """Load the model, the text and the files that the settings name, and check them.

    Args:
        settings: of the run.
        recorder: receives progress and notices.
        writes: check also that the output can be written and uploaded.
        folder: where activations go that memory does not hold; beside the output without.
        processes: of the run on this machine, which share its memory.

    Raises:
        CptqError: anything that makes the run impossible; see the modules that are called.
    """
    runtime = find_runtime(settings.runtime)
    plan = None if settings.plan is None else Plan.load(settings.plan)
    model = load_dense(
        settings, recorder, conv1d=runtime.conv1d, folder=folder, processes=processes
    )
    check_units(model)
    if any(width < 16 for width in settings.bits):
        runtime.check_tensors(spec.name for spec in model.tensors)
    space = _build_search_space(settings, runtime, model, plan, recorder)
    with recorder.stage("plan"):
        if writes and settings.push_to_hub is not None:
            check_push(settings.push_to_hub, settings.model.token)
        plan = None if plan is None else fit_plan(plan, model, space.cost)
        ledger = _build_ledger(settings, plan, space)
        tables = _read_tables(settings, model, space, recorder)
        asked, need = _find_size(ledger, plan)
        refuse_larger(settings, model, space.cost, asked, need, recorder)
        out = settings.out or Path(f"{model.path.name}-cptq-{asked}")
        if writes:
            place = check_output(out, overwrite=settings.overwrite, source=model.path)
            check_space(place, need)
    if writes or settings.dry_run:
        check_loadable(
            model,
            runtime,
            space.form,
            space.candidates,
            space.cost.units,
            recorder,
            trust_remote_code=settings.model.trust_remote_code,
        )
    compare = settings.check_uniform and plan is None and settings.allocator not in BLIND
    calibration, held_out = _read_text(settings, model, recorder)
    return CompressInputs(
        settings=settings,
        runtime=runtime,
        model=model,
        space=space,
        ledger=ledger,
        plan=plan,
        tables=tables,
        out=out,
        need=need,
        calibration=calibration,
        held_out=held_out,
        compare_with_baseline=compare,
    )


def _build_search_space(
    settings: CompressSettings,
    runtime: Runtime,
    model: LoadedModel,
    plan: Plan | None,
    emit: Emit,
) -> SearchSpace:
    """Find the file format, and the candidates of every unit that the runtime can hold."""
    candidates = build_candidates(settings, model)
    check_of_use(candidates, model, runtime)
    if settings.asymmetric:
        _report_symmetric(candidates, runtime, emit)
    offered = _offer_vocabulary(settings, model, candidates)
    chosen = list(plan.choices.items()) if plan is not None else []
    outer = {unit.name for unit in model.vocabulary}
    packed = any(not c.dense and not c.float8 for name, c in chosen if name in outer)
    form = runtime.format_for(
        model.layers,
        asymmetric=bool(list_asymmetric_widths(settings))
        or not all(choice.symmetric for _, choice in chosen),
        vocabulary=packed or (plan is None and _needs_packing(offered, runtime)),
        uneven=any(c.levels for c in ([c for _, c in chosen] or candidates)),
    )
    rules = list_rules(settings.activation_sparsity, model)
    layout = _find_layout(form, rules)
    if plan is None:
        taken = _take_vocabulary(model, offered, layout, runtime, emit)
    else:
        taken = [unit for unit in model.vocabulary if unit.name in plan.choices]
    most = parse_shard_size(settings.max_shard_size)
    cost = _build_cost(model, taken, layout, runtime, most)
    return SearchSpace(
        candidates=candidates,
        options=_apply_constraints(settings, model, candidates, offered, cost, emit),
        form=form,
        cost=cost,
        rules=rules,
    )


def _find_layout(form: str, rules: Mapping[str, str]) -> Layout:
    layout = FORMATS.get(form).layout
    return RuledLayout(layout, rules) if rules else layout


def _offer_vocabulary(
    settings: CompressSettings, model: LoadedModel, candidates: Sequence[Candidate]
) -> dict[str, tuple[Candidate, ...]]:
    """Return what each unit of the vocabulary may get; of one width where --embedding-bits says."""
    bits = settings.embedding_bits
    if bits is None:
        return offer_vocabulary(model, candidates)
    return offer_vocabulary(model, build_candidates(settings, model, (bits,)))


def _needs_packing(offered: Mapping[str, Sequence[Candidate]], runtime: Runtime) -> bool:
    """Whether a plan may pack a matrix of the vocabulary in integers."""
    rows = [candidate for row in offered.values() for candidate in row]
    return any(c.bits in runtime.vocabulary and not c.float8 for c in rows)


def _explain_dense(
    unit: Unit, row: Sequence[Candidate], layout: Layout, runtime: Runtime
) -> str | None:
    """Return why a unit of the vocabulary can only be dense; None where it can be more."""
    (spec,) = unit.layers
    why: str | None = "--bits and --embedding-bits leave it no other width"
    for candidate in row:
        if candidate.dense:
            continue
        why = explain_layer_refusal(spec, candidate, layout, runtime)
        if why is None:
            return None
    return why


def _take_vocabulary(
    model: LoadedModel,
    offered: Mapping[str, Sequence[Candidate]],
    layout: Layout,
    runtime: Runtime,
    emit: Emit,
) -> list[Unit]:
    """Return the units of the vocabulary that can be more than dense.

    Report, before any work, what stays at 16 bits or cannot go below 8, and where it could.
    """
    packing = [name for name, known in RUNTIMES.items() if known.vocabulary]
    way = f"--runtime {' or '.join(packing)} packs it in fewer bits"
    taken = []
    for unit in model.vocabulary:
        share = f"{unit.numel / max(1, model.parameters):.0%} of the weights"
        why = _explain_dense(unit, offered[unit.name], layout, runtime)
        if why is None:
            taken.append(unit)
            if not runtime.vocabulary:
                message = f"{share}, stored in 8 or 16 bits; {way}"
                emit(Notice(kind="info", subject=unit.name, message=message))
            continue
        message = f"kept dense, {share}: {why}"
        message += "" if runtime.vocabulary else f"; {way}"
        emit(Notice(kind="skipped", subject=unit.name, message=message))
    return taken


def _report_symmetric(candidates: Sequence[Candidate], runtime: Runtime, emit: Emit) -> None:
    """Emit a notice about widths that stay on symmetric grids in spite of --asymmetric."""
    labels = [c.label for c in candidates if c.symmetric and not c.dense]
    if labels:
        message = f"{', '.join(labels)} stay symmetric: {runtime.name} has no other"
        emit(Notice(kind="info", subject="--asymmetric", message=message))


def _apply_constraints(
    settings: CompressSettings,
    model: LoadedModel,
    candidates: Sequence[Candidate],
    offered: Mapping[str, Sequence[Candidate]],
    cost: CostModel,
    emit: Emit,
) -> dict[str, tuple[Candidate, ...]]:
    """Return the candidates of each unit after --pin, --min-bits and --max-bits.

    `offered`: those of the units of the vocabulary.
    """
    constraints = parse_constraints(settings.pins, settings.min_bits, settings.max_bits)
    options = apply_constraints(
        constraints,
        cost.units,
        candidates,
        offered=offered,
        group_size=settings.group_size,
        asymmetric=list_asymmetric_widths(settings),
        layers=model.layers,
        emit=emit,
    )
    if settings.scales != "16bit":  # a pin may name a width that is not offered
        choose = cost.runtime.choose_grid
        options = {unit: tuple(map(choose, row)) for unit, row in options.items()}
    if constraints.pins:
        cost.check_pinned(options)
    return options


def _build_ledger(
    settings: CompressSettings, plan: Plan | None, space: SearchSpace
) -> Ledger | None:
    """Return the ledger of --target, which some plan must reach; None where a plan is given."""
    if plan is not None:
        return None
    target = settings.target or DEFAULT_TARGET
    return resolve_target(target, space.cost, settings.group_size, space.options)


def _find_size(ledger: Ledger | None, plan: Plan | None) -> tuple[str, int]:
    """Return the target as typed, and the most bytes that the file can take."""
    if ledger is not None:
        return ledger.budget.asked, ledger.bound_file_bytes()
    assert plan is not None
    return plan.budget.asked, plan.predicted_bytes


def _read_tables(
    settings: CompressSettings, model: LoadedModel, space: SearchSpace, emit: Emit
) -> dict[str, SensitivityTable]:
    """Read the table of --sensitivity."""
    if settings.sensitivity is None:
        return {}
    wanted = {**space.options, **space.list_vocabulary_options(model)}
    table = fill_in_scales(read_table(settings.sensitivity, model.fingerprint), wanted, emit)
    check_covers(table, settings.sensitivity, wanted)
    return {table.metric: table}


def _read_text(
    settings: CompressSettings, model: LoadedModel, recorder: Recorder
) -> tuple[Calibration, HeldOutText]:
    """Read the text that calibrates, and hold out one part to judge.

    Two more are held out for --refine, and one for --tune. Where the text is short nothing judges.
    """
    needed = ["search", "guard"] if settings.refine else []
    needed += ["tune"] if settings.tune else []
    count = max(LEAST_PARTS, len(needed) + 1)
    calibration = calibrate(model, settings, recorder, parts=count, reserve=False)
    rows = calibration.held_out
    uses = [*needed, "judge"] if len(rows) >= max(LEAST_CHECK_ROWS, len(needed) + 1) else needed
    if not uses:
        return calibration, HeldOutText()
    parts = split_parts(model, rows, len(uses))
    return calibration, HeldOutText(**dict(zip(uses, parts, strict=True)))


def load_dense(
    settings: AnalyzeSettings | CompressSettings,
    recorder: Recorder,
    *,
    conv1d: bool = False,
    folder: Path | None = None,
    processes: int = 1,
) -> LoadedModel:
    """Load a model that is not compressed yet; `conv1d` as in `load_model`.

    What memory does not hold of its activations goes to `folder`, beside the output without;
    `processes` share the memory.

    Raises:
        ModelError: it is compressed, or cannot be loaded.
        UsageError: --max-memory does not hold a block of it.
    """
    folder = folder or (settings.out or Path("out")).expanduser().absolute().parent
    memory = choose_memory(parse_max_memory(settings.max_memory), folder, processes)
    with recorder.stage("load"):
        model = load_model(
            settings.model, recorder, conv1d=conv1d, experts=True, memory=memory, dense=True
        )
    report_memory(model, recorder)
    return model


def calibrate(
    model: LoadedModel,
    settings: AnalyzeSettings | CompressSettings,
    recorder: Recorder,
    *,
    parts: int = 0,
    reserve: bool = True,
) -> Calibration:
    """Read the calibration text as the model's tokens, and hold out rows for `parts` parts.

    `reserve`: where the text is short, fewer samples calibrate, so that some rows are held out.
    """
    with recorder.stage("calibration"):
        recorder(Progress(stage="calibration", done=0, total=None, message="read text"))
        calibration = build_calibration(
            model,
            settings.calibration,
            settings.model,
            recorder,
            held_out=parts * count_part_rows(model, settings.calibration.seqlen),
            reserve=reserve,
        )
    model.give_back_memory()
    return calibration


def build_cost_model(
    model: LoadedModel,
    settings: AnalyzeSettings,
    candidates: Sequence[Candidate],
    offered: Mapping[str, Sequence[Candidate]],
) -> CostModel:
    """Return the cost model of the file that the runtime loads; `offered`: `offer_vocabulary`."""
    runtime = find_runtime(settings.runtime)
    form = runtime.format_for(
        model.layers,
        asymmetric=settings.asymmetric,
        vocabulary=_needs_packing(offered, runtime),
        uneven=any(candidate.levels for candidate in candidates),
    )
    layout = FORMATS.get(form).layout
    taken = _take_vocabulary(model, offered, layout, runtime, lambda event: None)
    return _build_cost(model, taken, layout, runtime)


def _build_cost(
    model: LoadedModel,
    taken: Sequence[Unit],
    layout: Layout,
    runtime: Runtime,
    shard_bytes: int = SHARD_BYTES,
) -> CostModel:
    """Return the cost model of the file that the runtime reads; `taken` of the vocabulary."""
    units = (*model.units, *taken)
    if not runtime.gguf:
        return CostModel(units, model.tensors, layout, runtime, shard_bytes=shard_bytes)
    sizes = measure_sizes(build_content(model, (), lambda event: None))
    return CostModel(units, model.tensors, GGUF_LAYOUT, runtime, sizes)

"""From a checkpoint and its settings to the plan that `cptq compress` carries out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from cptq.allocation import BLIND
from cptq.allocation.allocate import allocate
from cptq.allocation.constraints import apply_constraints, parse_constraints
from cptq.allocation.cost import CostModel
from cptq.allocation.experts import fix_experts, list_experts
from cptq.allocation.ledger import Ledger
from cptq.allocation.targets import resolve_target
from cptq.artifact.formats import FORMATS
from cptq.artifact.hub import check_push
from cptq.artifact.place import check_space
from cptq.artifact.writer import check_output
from cptq.calibration.judges import parts
from cptq.calibration.slices import Rows
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.compression.embeddings import embedding_tensors
from cptq.config import CompressSettings, find_runtime
from cptq.errors import BudgetError
from cptq.pipeline.dense import asked_for, asymmetric_widths, calibrate, load_dense
from cptq.pipeline.files import check_covers, fitting, read_plan, read_table
from cptq.pipeline.recorder import Recorder
from cptq.pipeline.refine import refine_plan
from cptq.sensitivity.measure import measure
from cptq.sensitivity.prepare import check_units
from cptq.types import Candidate, Emit, Notice, Plan, SensitivityTable

DEFAULT_TARGET = "4bit"
#: fewest spare rows on which a mixed plan is compared with the uniform one
LEAST_JUDGES = 4


@dataclass(kw_only=True, eq=False)
class Planning:
    """The steps up to a plan, and what they hand on to each other."""

    settings: CompressSettings
    recorder: Recorder
    plan: Plan | None = None
    ledger: Ledger | None = None
    tables: dict[str, SensitivityTable] = field(default_factory=dict)
    calibration: Calibration = field(init=False)
    judging: list[list[Rows]] = field(default_factory=list)
    checking: bool = False

    def __post_init__(self) -> None:
        settings, self.runtime = self.settings, find_runtime(self.settings.runtime)
        if settings.plan is not None:
            self.plan = read_plan(settings.plan, self.runtime)
        self.model: LoadedModel = load_dense(
            settings.model, self.recorder, conv1d=self.runtime.conv1d
        )
        check_units(self.model)
        if any(width < 16 for width in self.settings.bits):
            self.runtime.check_tensors(spec.name for spec in self.model.tensors)
        self.asymmetric = asymmetric_widths(settings)
        kept = self.plan.choices.values() if self.plan is not None else ()
        offset = bool(self.asymmetric) or not all(choice.symmetric for choice in kept)
        self.embedding = self.embedding_candidate()
        self.form = self.runtime.format_for(
            self.model.layers, asymmetric=offset, embedding=self.embedding is not None
        )
        self.layout = FORMATS.get(self.form).layout
        self.choices = asked_for(settings)
        if settings.asymmetric:
            self.say_symmetric()
        self.cost = CostModel(
            self.model.units,
            self.model.tensors,
            self.layout,
            self.runtime,
            embedding_tensors(self.model, self.embedding, self.layout, self.runtime, self.recorder),
        )
        self.options: dict[str, tuple[Candidate, ...]] = self.allowed()

    def embedding_candidate(self) -> Candidate | None:
        """What embeddings become: by the plan, or --embedding-bits."""
        settings = self.settings
        if self.plan is not None:
            return self.plan.embedding
        if settings.embedding_bits is None:
            return None
        return Candidate(
            bits=settings.embedding_bits,
            group_size=settings.group_size,
            symmetric=settings.embedding_bits not in self.asymmetric,
        )

    def say_symmetric(self) -> None:
        """Widths that the runtime has on symmetric grids alone, whatever is asked."""
        even = [c.label for c in self.choices if c.symmetric and not c.dense]
        if even:
            message = f"{', '.join(even)} stay symmetric: {self.runtime.name} has no other"
            self.recorder(Notice(kind="info", subject="--asymmetric", message=message))

    def allowed(self) -> dict[str, tuple[Candidate, ...]]:
        """The candidates of each unit, by --pin, --min-bits and --max-bits."""
        settings, model = self.settings, self.model
        constraints = parse_constraints(settings.pins, settings.min_bits, settings.max_bits)
        options = apply_constraints(
            constraints,
            model.units,
            self.choices,
            group_size=settings.group_size,
            asymmetric=self.asymmetric,
            layers=model.layers,
            emit=self.recorder,
        )
        if constraints.pins:
            self.cost.check_pinned(options)
        return options

    def read_target_or_plan(self) -> None:
        """Read the plan, or build the target's ledger; refuse a target that no plan reaches."""
        settings = self.settings
        if settings.push_to_hub is not None:
            check_push(settings.push_to_hub, settings.model.token)
        if self.plan is not None:
            self.plan = fitting(self.plan, self.model, self.cost)
            asked, need = self.plan.budget.asked, self.plan.predicted_bytes
        else:
            target = settings.target or DEFAULT_TARGET
            self.ledger = resolve_target(target, self.cost, settings.group_size, self.options)
            asked, need = self.ledger.budget.asked, self.ledger.bound_file_bytes()
        if settings.sensitivity is not None:
            self.read_table()
        self.out = settings.out or Path(f"{self.model.path.name}-cptq-{asked}")
        place = check_output(self.out, overwrite=settings.overwrite, source=self.model.path)
        check_space(place, need)

    def prepare_text(self) -> None:
        """Calibrate; keep text apart for the search (two parts) and for the check (one)."""
        blind = self.settings.allocator in BLIND
        self.checking = self.settings.check_uniform and self.plan is None and not blind
        wanted = (2 if self.settings.refine else 0) + int(self.checking)
        self.calibration = calibrate(
            self.model, self.settings, self.recorder, judging=wanted, reserve=False
        )
        if wanted and (self.settings.refine or len(self.calibration.spare) >= LEAST_JUDGES):
            self.judging = parts(self.model, self.calibration.spare, wanted)

    def make_plan(self) -> Plan:
        """Measure where the allocator needs it and no file of --sensitivity has it; allocate."""
        settings = self.settings
        if settings.sensitivity is None and settings.allocator not in BLIND:
            self.measure()
        with self.recorder.stage("allocation"):
            return self.allocate(settings.allocator, self.table, self.recorder)

    @property
    def table(self) -> SensitivityTable | None:
        """The scores that decide, if any were asked for."""
        return next(iter(self.tables.values()), None)

    def allocate(self, name: str, table: SensitivityTable | None, emit: Emit) -> Plan:
        """Make a plan by the allocator `name`."""
        assert self.ledger is not None
        plan = allocate(
            name,
            table,
            self.ledger,
            self.choices,
            model_fingerprint=self.model.fingerprint,
            emit=emit,
        )
        return replace(plan, embedding=self.embedding)

    def refined(self, plan: Plan) -> Plan:
        """The plan after --refine."""
        if not self.settings.refine:
            return plan
        with self.recorder.stage("refinement"):
            return refine_plan(
                self.model,
                self.calibration,
                self.judging[:2],
                plan,
                self.table,
                self.free(plan),
                self.settings,
                self.recorder,
            )

    def free(self, plan: Plan) -> Ledger:
        """Return the ledger of what a refinement can change: all but the experts' one scheme."""
        assert self.ledger is not None
        experts = list_experts(self.model.units)
        return fix_experts(self.ledger, plan.choices[experts[0]]) if experts else self.ledger

    def rival(self, plan: Plan) -> Plan | None:
        """The plan to beat; None where none is needed, or no text is left to judge on."""
        if not self.checking:
            return None
        try:
            rival = self.allocate("even", None, lambda _: None)
        except BudgetError:  # of the candidates only sparse ones are small enough
            message = "no plan without sparse weights is so small: nothing to compare with"
            self.recorder(Notice(kind="warning", subject="--check-uniform", message=message))
            return None
        if rival.choices == plan.choices:
            return None
        if not self.judging:
            message = (
                "no text is left beside what calibrates: the plan is not compared with a uniform "
                "one; fewer --samples or a longer text would leave some"
            )
            self.recorder(Notice(kind="warning", subject="--check-uniform", message=message))
            return None
        return rival

    def measure(self) -> None:
        """Fill `tables` with that of the metric asked for."""
        with self.recorder.stage("sensitivity"):
            self.tables = measure(
                self.model,
                self.calibration,
                metrics=[self.settings.metric],
                candidates=self.choices,
                seed=self.settings.calibration.seed,
                emit=self.recorder,
            )

    def read_table(self) -> None:
        """Fill `tables` from the file of --sensitivity."""
        assert self.settings.sensitivity is not None
        table = read_table(self.settings.sensitivity, self.model.fingerprint)
        check_covers(table, self.settings.sensitivity, self.options)
        self.tables = {table.metric: table}

"""Walk a family the whole way: analyze, compress, verify, eval; compare with plain forward passes.

A verdict is `works`, `refused` (at the door, with the sentence), `late` (refused after the work was
begun), `wrong` (a number differs from the one computed by hand) or `error` (an exception that is
not a `CptqError`). A family that the default runtime refuses, naming another, is walked with that
one. A row is written as soon as a family is done, so that a walk can be interrupted and goes on
where it was; of several rows of a family the last one counts.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import cptq
from cptq.artifact import reload
from cptq.calibration.replay import BlockReplay, forward
from cptq.checkpoint.loader import load_model
from cptq.checkpoint.model import LoadedModel
from cptq.config import ModelSettings
from cptq.config.analysis import DEFAULT_METRIC
from cptq.errors import ArtifactError, CptqError
from cptq.layouts.pack_quantized import INITIALIZED
from cptq.types import Event, Notice, Progress, is_expert
from tests.families import UNBUILT, build_family, choose_kind
from tests.tiny_models import SENTENCES
from tests.unit.artifact.same_process import run_here

SEQLEN, SAMPLES, LINES, GROUP, BITS = 64, 4, 32, 16, (2, 4, 16)
#: tokens of padding at the end of the second row that is compared
PADDING = 20
METRICS = (DEFAULT_METRIC, "cca", "pruning", "taylor")
#: stages of a run in which nothing is measured or compressed
DOOR = ("load", "plan")
#: why experts stay dense that are no linears of their own
STACKED = "experts in one tensor (counted by tensors)"
#: how a refusal names the runtime that takes the family
OTHER_RUNTIME = "--runtime cptq"
#: largest difference of the replay from a plain forward, as a share of the largest output
EXACT = 1e-5
#: a compressor may be so much worse than nearest rounding, in divergence, before that is "wrong"
WORSE = 1.5


@dataclass
class Row:
    """What became of a family."""

    family: str
    kind: str = ""
    verdict: str = "works"
    step: str = ""
    text: str = ""
    runtime: str = ""
    compressed: int = 0
    dense: dict[str, int] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    replay: float | None = None
    padded: float | None = None
    divergence: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def write_text(path: Path) -> Path:
    """Write a text of some two thousand tokens, each line its own."""
    lines = [
        f"{SENTENCES[i % 5]} {i * 7919 % 1009} {SENTENCES[i * 3 % 5][: i % 60]}"
        for i in range(LINES)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def walk(families: Iterable[str], out: Path, *, until: float = math.inf) -> Iterator[Row]:
    """Walk families, append their rows to `out`, and yield them.

    Args:
        families: names.
        out: a JSON lines file.
        until: begin no family after this many seconds.
    """
    start = time.monotonic()
    for family in families:
        if time.monotonic() - start > until:
            return
        with tempfile.TemporaryDirectory() as folder, _same_process():
            row = walk_family(family, Path(folder))
        with out.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(row)) + "\n")
        yield row


def read_rows(path: Path) -> dict[str, Row]:
    """Return the last row of each family in a JSON lines file; none where there is no file."""
    if not path.exists():
        return {}
    rows = [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row.family: row for row in rows}


@contextmanager
def _same_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reload, "_run", _run_here)
        yield


def _run_here(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Load with stock transformers in this process; what it raises is told as in a fresh one."""
    try:
        return run_here(folder, job)
    except Exception as error:
        raise ArtifactError(f"cannot load what was written: {error!r}") from error


def walk_family(family: str, folder: Path) -> Row:
    """Walk one family; nothing that goes wrong escapes."""
    row, start = Row(family), time.monotonic()
    if family in UNBUILT:
        row.verdict, row.text = "not built", UNBUILT[family]
        return row
    row.kind = choose_kind(family)
    way = _Way(row, folder)
    try:
        way.go()
    except CptqError as error:
        row.verdict, row.text = way.judge_refusal(error), str(error)
    except Exception as error:
        row.verdict = "not built" if row.step == "build" else "error"
        row.text = f"{type(error).__name__}: {error}"[:300]
    row.seconds = round(time.monotonic() - start, 1)
    return row


class _Way:
    """The steps of one family."""

    def __init__(self, row: Row, folder: Path) -> None:
        self.row, self.folder = row, folder
        self.text = write_text(folder / "text.txt")
        self.path = folder / "model"
        self.options: dict[str, Any] = {
            "calibration": str(self.text),
            "samples": SAMPLES,
            "seqlen": SEQLEN,
            "group_size": GROUP,
            "bits": BITS,
        }
        self.heard: list[Event] = []

    def go(self) -> None:
        """Go all steps."""
        self._do("build", lambda: build_family(self.path, self.row.family))
        torch.manual_seed(0)
        dense = self._do("load", self._load)
        self.row.replay = self._do("replay", lambda: self._compare_replay(dense, 0))
        self.row.padded = self._do("replay padded", lambda: self._compare_replay(dense, PADDING))
        self._do("analyze", self._analyze)
        for compressor in ("nearest", "gptq"):
            self._carry_out(dense, compressor)
        # a classifier gives a few numbers for the whole batch, which tell nothing
        own, nearest = (self.row.divergence[name] for name in ("gptq", "nearest"))
        told = any("worse than nearest" in note for note in self.row.notices)
        if self.row.kind != "classifier" and own > WORSE * nearest + 1e-6 and not told:
            self._fail(f"gptq diverges by {own:.3g}, nearest rounding by {nearest:.3g}")

    def judge_refusal(self, error: CptqError) -> str:
        """Return whether a refusal came at the door, or after work was begun."""
        begun = any(isinstance(e, Progress) and e.stage not in DOOR for e in self.heard)
        return "late" if begun or isinstance(error, ArtifactError) else "refused"

    def _carry_out(self, dense: LoadedModel, compressor: str) -> None:
        out = self.folder / compressor
        self._do(f"compress {compressor}", lambda: self._compress(compressor, out))
        self._do(f"verify {compressor}", lambda: cptq.verify(out, progress=self.heard.append))
        module = self._do(f"load {compressor}", lambda: cptq.load(out))
        self._do(f"eval {compressor}", lambda: self._evaluate(out, module))
        self._do(f"compare {compressor}", lambda: self._diverge(dense, compressor, module))
        shutil.rmtree(out)

    def _do(self, step: str, run: Callable[[], Any]) -> Any:
        self.row.step = step
        try:
            return run()
        finally:
            told = {f"{e.subject}: {e.message}" for e in self.heard if isinstance(e, Notice)}
            kept = ("chain", "worse than nearest", "router", "forward of its own")
            found = {n for n in told if any(word in n for word in kept)}
            self.row.notices = sorted(found | set(self.row.notices))

    def _fail(self, text: str) -> None:
        self.row.verdict, self.row.text = "wrong", text

    def _load(self) -> LoadedModel:
        settings = ModelSettings(model=str(self.path))
        model = load_model(settings, self.heard.append, conv1d=True, experts=True)
        inner = [s for s in model.layers if s.kind not in ("embedding", "head")]
        self.row.compressed = sum(spec.compressible for spec in inner)
        dense = Counter(str(s.reason) for s in inner if not s.compressible)
        dense[INITIALIZED] = sum(s.initialized and s.compressible for s in inner)
        dense[STACKED] = sum(
            is_expert(spec.name) and not spec.name.endswith(("weight", "bias"))
            for spec in model.tensors
        )
        self.row.dense = {reason: count for reason, count in dense.items() if count}
        return model

    def _batch(self, padding: int = 0) -> dict[str, torch.Tensor]:
        tokenizer = AutoTokenizer.from_pretrained(self.path)
        ids = tokenizer(self.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids
        ids = ids[:, 500 : 500 + 2 * SEQLEN].reshape(2, SEQLEN)
        mask = torch.ones_like(ids)
        mask[1, SEQLEN - padding :] = 0
        return {"input_ids": ids, "attention_mask": mask}

    @torch.no_grad()
    def _compare_replay(self, model: LoadedModel, padding: int) -> float:
        """Return the difference of the replay from a plain forward, where tokens are no padding."""
        batch = self._batch(padding)
        replay = BlockReplay(model, [batch])
        hidden = replay.embed(0)
        for block in range(len(model.blocks)):
            hidden = replay.run(block, hidden, 0)
        ours, plain = _answer(replay.finish(hidden, 0)), _answer(forward(model, batch))
        if plain.ndim == 3 and plain.shape[1] == SEQLEN:
            ours, plain = (x[batch["attention_mask"].bool()] for x in (ours, plain))
        share = float((ours - plain).abs().max() / plain.abs().max())
        if not share <= EXACT:
            self._fail(f"{self.row.step} differs from a plain forward by {share:.2g}")
        return share

    def _analyze(self) -> None:
        out = self.folder / "analysis"
        cptq.analyze(
            self.path, out=out, metrics=METRICS, progress=self.heard.append, **self.options
        )

    def _compress(self, compressor: str, out: Path) -> None:
        self.heard.clear()
        try:
            self._compress_for_runtime(compressor, out)
        except CptqError as error:
            named = OTHER_RUNTIME in str(error)
            if "runtime" in self.options or not named or self.judge_refusal(error) == "late":
                raise
            self.options["runtime"] = self.row.runtime = "cptq"
            self.row.text = str(error)
            self._compress_for_runtime(compressor, out)

    def _compress_for_runtime(self, compressor: str, out: Path) -> None:
        cptq.compress(
            self.path, out=out, target="4bit", compressor=compressor, allocator="uniform",
            overwrite=True, progress=self.heard.append, **self.options,
        )  # fmt: skip

    def _evaluate(self, out: Path, module: torch.nn.Module) -> None:
        if self.row.kind != "causal-lm":
            return
        outcome = cptq.evaluate(
            out, tasks=(f"text:{self.text}",), seqlen=SEQLEN, limit=3, progress=self.heard.append
        )
        (found,) = [r for r in outcome.summary.evaluation if r.metric == "perplexity"]
        known = self._compute_perplexity(module)
        if not math.isclose(found.value, known, rel_tol=1e-3):
            self._fail(f"perplexity {found.value:.6g}, by hand {known:.6g}")

    @torch.no_grad()
    def _compute_perplexity(self, module: torch.nn.Module) -> float:
        tokenizer = AutoTokenizer.from_pretrained(self.path)
        ids = tokenizer(self.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids
        rows = ids[0, : 3 * SEQLEN].reshape(3, SEQLEN)
        total = 0.0
        for row in rows:
            p = module(input_ids=row[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
            total -= float(p[torch.arange(SEQLEN - 1), row[1:]].sum())
        return math.exp(total / (3 * (SEQLEN - 1)))

    @torch.no_grad()
    def _diverge(self, dense: LoadedModel, compressor: str, module: torch.nn.Module) -> None:
        batch = self._batch()
        own, other = _answer(forward(dense, batch)), _answer(module(**batch))
        share = (own.double() - other.double()).square().sum() / own.double().square().sum()
        self.row.divergence[compressor] = float(share)


def _answer(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    answer = output.last_hidden_state if logits is None else logits
    assert isinstance(answer, torch.Tensor)
    return answer

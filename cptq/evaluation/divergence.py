"""Divergence of a model's predictions from a baseline's, token by token on the same text.

Perplexity can stay the same while half the answers change; these measures detect that. At every
predicted token, with p the baseline's distribution and q the model's over the vocabulary,

    KL(p || q) = sum p (ln p - ln q)        nats, 0 where the two agree

and two yes-or-no questions: do both find the same token likeliest (top-1 agreement); and is exactly
one of them right about the next token (a flip, as Dutta et al. 2024, "Accuracy is not all you
need", count flips of answers: right to wrong and wrong to right)? Reported are the mean KL, its
percentiles 99 and 99.9 over tokens, the share of agreement and the share of flips.

Standard errors take windows as the independent samples, as those of perplexity do. A percentile is
no mean; Woodruff's method (1952, "Confidence intervals for medians and other position measures")
makes one of it. Let q be the sample's quantile at the level p. The share of tokens up to q is a
ratio of sums over windows, whose standard error s is that of `cptq.evaluation.perplexity`; carried
back through the sample's own quantiles it is one of q:

    stderr(q) = ( Q(p + s) - Q(p - s) ) / 2

It takes no resampling and no estimate of a density. Where p + s exceeds 1 the windows are too few
to estimate how heavy the tail is, and there is no error (None) rather than one that is too small. A
maximum would have none at all: it grows with the number of tokens, and depends on one of them.

Memory: never two models, never the logits of a text. While the baseline is measured, its last
hidden states go to a temporary file (float32, a few kB a token) and its head stays; its logits are
made from them when the model is measured, a few hundred positions at a time, and give its
perplexity and the divergence: one product with each head. A model that has no head of its own keeps
its logits instead. Where the disk has no room for the file, nothing is compared, and a notice says
so.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cptq.evaluation.perplexity import Estimate, estimate_ratio
from cptq.evaluation.split_model import Chunk
from cptq.evaluation.task import Build
from cptq.numerics.logits import compare_logits
from cptq.types import Emit, EvalResult, Notice
from cptq.types.samples import build_ratios

#: of the free disk, how much the hidden states of one text may take
DISK_SHARE = 0.5
#: metric -> the quantile of the KL over tokens
QUANTILES = {"kl_p99": 0.99, "kl_p99.9": 0.999}

Numbers = np.ndarray[Any, Any]


@dataclass(kw_only=True)
class RecordedStates:
    """A baseline's last hidden states on the windows of one text, and its head."""

    fingerprint: str
    path: Path
    shape: tuple[int, int]  # windows, predictions
    emit: Emit
    name: str
    head: nn.Module | None = None
    chunks: list[tuple[slice, slice]] = field(default_factory=list)
    states: np.memmap[Any, np.dtype[np.float32]] | None = None
    labels: list[Tensor] = field(default_factory=list)
    like: Tensor | None = None
    build: Build | None = None
    nll_N: Numbers | None = None

    def __call__(self, chunk: Chunk) -> bool:
        """Record the hidden states of a chunk; return whether there is room for them."""
        if self.head is None:
            self.head, self.like = chunk.head, chunk.hidden_BTC[:0]
            self._make_room(chunk.hidden_BTC.shape[-1])
        if self.states is None:
            return False
        self.states[chunk.rows, chunk.positions] = chunk.hidden_BTC.float().cpu().numpy()
        self.labels.append(chunk.labels_BT)
        self.chunks.append((chunk.rows, chunk.positions))
        return True

    def recall(self, rows: slice, positions: slice, labels_BT: Tensor) -> Chunk:
        """Return predictions that were recorded, in the baseline's type and on its device."""
        assert self.states is not None
        assert self.head is not None
        assert self.like is not None
        states_BTC = torch.from_numpy(self.states[rows, positions].copy()).to(self.like)
        return Chunk(
            head=self.head,
            rows=rows,
            positions=positions,
            hidden_BTC=states_BTC,
            labels_BT=labels_BT,
        )

    def add_nll(self, chunk: Chunk) -> None:
        """Add the nll of some predictions to those of their windows."""
        if self.nll_N is None:
            self.nll_N = np.zeros(self.shape[0])
        self.nll_N[chunk.rows] += chunk.compute_nll().sum(1).cpu().numpy()

    def finish(self) -> list[EvalResult]:
        """Return the baseline's own results, which its hidden states were taken instead of."""
        if self.build is None:
            return []
        if self.nll_N is None:  # nothing was compared with it
            with torch.inference_mode():
                for (rows, positions), labels_BT in zip(self.chunks, self.labels, strict=True):
                    self.add_nll(self.recall(rows, positions, labels_BT))
        assert self.nll_N is not None
        return self.build(self.nll_N)

    def _make_room(self, width: int) -> None:
        shape = (*self.shape, width)
        needed, free = 4 * int(np.prod(shape)), shutil.disk_usage(self.path.parent).free
        if needed > DISK_SHARE * free:
            message = (
                f"no KL to the baseline: its outputs take {needed:,} bytes of temporary disk, and "
                f"{free:,} are free; --limit takes less text"
            )
            self.emit(Notice(kind="skipped", subject=self.name, message=message))
            return
        self.states = np.memmap(self.path, dtype=np.float32, mode="w+", shape=shape)


@dataclass(kw_only=True)
class StateRecorder:
    """Observes the baseline and records its hidden states; `folder` is a temporary directory."""

    folder: Path
    recorded: dict[str, RecordedStates] = field(default_factory=dict)
    last: str = ""

    def start(
        self, name: str, fingerprint: str, shape: tuple[int, int], emit: Emit
    ) -> Callable[[Chunk], bool] | None:
        """Record the baseline's states on this text."""
        windows, seqlen = shape
        self.last = name
        self.recorded[name] = RecordedStates(
            fingerprint=fingerprint,
            path=self.folder / f"{len(self.recorded)}.float32",
            shape=(windows, seqlen - 1),
            emit=emit,
            name=name,
        )
        return self.recorded[name]

    def take_over(self, build: Build) -> bool:
        """Return whether the states of the last text are recorded: its logits are made later."""
        recorded = self.recorded[self.last]
        if recorded.states is None:
            return False
        recorded.build = build
        return True

    def read_results(self, like: EvalResult) -> list[EvalResult]:
        """Return none: the baseline is not compared with itself."""
        return []

    def finish(self) -> list[EvalResult]:
        """Return the results of the texts that were taken over."""
        return [result for text in self.recorded.values() for result in text.finish()]


@dataclass(kw_only=True)
class StateComparer:
    """Observes the model and compares it with the baseline's recorded states."""

    recorded: dict[str, RecordedStates]
    found: TokenComparison | None = None

    def start(
        self, name: str, fingerprint: str, shape: tuple[int, int], emit: Emit
    ) -> Callable[[Chunk], bool] | None:
        """Compare on this text, if the baseline got the same tokens."""
        self.found = None
        base = self.recorded.get(name)
        if base is None or base.states is None:
            return None
        if base.fingerprint != fingerprint:
            message = "no KL to the baseline: the two models get different tokens"
            emit(Notice(kind="skipped", subject=name, message=message))
            return None
        self.found = TokenComparison(base=base, emit=emit)
        return self.found

    def take_over(self, build: Build) -> bool:
        """Return that it never takes a text over."""
        return False

    def read_results(self, like: EvalResult) -> list[EvalResult]:
        """Return KL, agreement and flips on the text started last; none where none was compared."""
        if self.found is None or not self.found.found:
            return []
        return self.found.summarize(like)


@dataclass(kw_only=True)
class TokenComparison:
    """Per predicted token: the KL, whether the two agree, and whether one flips."""

    base: RecordedStates
    emit: Emit
    kl_NT: Numbers = field(init=False)
    same_NT: Numbers = field(init=False)
    flip_NT: Numbers = field(init=False)
    found: bool = False
    refused: bool = False

    def __post_init__(self) -> None:
        self.kl_NT, self.same_NT, self.flip_NT = (np.zeros(self.base.shape) for _ in range(3))

    def __call__(self, chunk: Chunk) -> bool:
        """Compare the predictions of a chunk."""
        if self.refused:
            return False
        base = self.base.recall(chunk.rows, chunk.positions, chunk.labels_BT)
        base_TV, own_TV = base.logits_BTV.flatten(0, 1), chunk.logits_BTV.flatten(0, 1)
        labels_T = chunk.labels_BT.flatten()
        self.found = self._check_vocabulary(base_TV.shape[-1], own_TV.shape[-1])
        self.refused = not self.found
        if self.refused:
            return False
        self.base.add_nll(base)
        kl_T, base_T, own_T = compare_logits(
            base_TV, own_TV, base.lse_BT.flatten(), chunk.lse_BT.flatten()
        )
        flip_T = (base_T == labels_T) != (own_T == labels_T)
        places = chunk.rows, chunk.positions
        for target, values in (
            (self.kl_NT, kl_T),
            (self.same_NT, base_T == own_T),
            (self.flip_NT, flip_T),
        ):
            target[places] = values.view(chunk.labels_BT.shape).cpu().numpy()
        return False

    def _check_vocabulary(self, base: int, own: int) -> bool:
        if base != own:
            message = f"no KL to the baseline: vocabularies of {own:,} and {base:,} tokens"
            self.emit(Notice(kind="skipped", subject=self.base.name, message=message))
        return base == own

    def summarize(self, like: EvalResult) -> list[EvalResult]:
        """Summarise all tokens in five results, described as the perplexity `like` is."""
        whole = np.full(len(self.kl_NT), self.kl_NT.shape[1])
        sums = [part.sum(1) for part in (self.kl_NT, self.same_NT, self.flip_NT)]
        agreement = (("kl", "nats", False), ("top1_agree", "of tokens", True))
        kinds = (*agreement, ("flips", "of tokens", False))
        means = [
            _describe(like, metric, unit, higher, estimate_ratio(sum_N, whole), sum_N, whole)
            for (metric, unit, higher), sum_N in zip(kinds, sums, strict=True)
        ]
        quantiles = [
            _describe(like, metric, "nats", False, estimate_quantile(self.kl_NT, level))
            for metric, level in QUANTILES.items()
        ]
        return [means[0], *quantiles, *means[1:]]


def _describe(
    like: EvalResult,
    metric: str,
    unit: str,
    higher: bool,
    estimate: Estimate,
    sum_N: Numbers | None = None,
    count_N: Numbers | None = None,
) -> EvalResult:
    both = sum_N is not None and count_N is not None
    short = () if estimate.stderr is not None else ("no standard error: too few windows",)
    return replace(
        like,
        metric=metric,
        unit=unit,
        higher_is_better=higher,
        value=estimate.value,
        stderr=estimate.stderr,
        per_sample=build_ratios(sum_N, count_N) if both else None,  # type: ignore[arg-type]
        notes=like.notes + short,
    )


def estimate_quantile(values_NT: Numbers, level: float) -> Estimate:
    """Estimate the quantile of all values, N windows of T tokens; no error where N is too small."""
    found = float(np.quantile(values_NT, level))
    windows, tokens = values_NT.shape
    below = estimate_ratio((values_NT <= found).sum(1), np.full(windows, tokens))
    if below.stderr is None or level + below.stderr > 1:
        return Estimate(value=found, stderr=None)
    low, high = np.quantile(values_NT, [max(level - below.stderr, 0.0), level + below.stderr])
    return Estimate(value=found, stderr=float(high - low) / 2)

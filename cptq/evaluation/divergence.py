"""How far a model's predictions are from a baseline's, token by token on the same text.

Perplexity can stay the same while half the answers change; these see it. At every predicted token,
with p the baseline's distribution and q the model's over the vocabulary,

    KL(p || q) = sum p (ln p - ln q)        nats, 0 where the two agree

and two yes-or-no questions: do both find the same token likeliest (top-1 agreement); and is exactly
one of them right about the token that comes (a flip, as Dutta et al. 2024, "Accuracy is not all you
need", count flips of answers: right to wrong and wrong to right)? Reported are the mean KL, its
percentiles 99 and 99.9 over tokens, the share of agreement and the share of flips. Standard errors
take windows as the independent samples, as those of perplexity do (`cptq.evaluation.tails` for the
percentiles).

Memory: never two models, never the logits of a text. While the baseline is measured, its last
hidden states go to a temporary file (float32, a few kB a token) and its head stays; the logits of
both are then made from hidden states, a few hundred positions at a time, when the model is
measured. A model that has no head of its own keeps its logits instead. Where the disk has no room
for the file, nothing is compared, and that is said.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cptq.calibration.tokens import digest_tokens
from cptq.evaluation.halves import LOGIT_ELEMENTS, positions_at_once
from cptq.evaluation.perplexity import Estimate, Witness, ratio
from cptq.evaluation.tails import quantile
from cptq.types import Emit, EvalResult, Notice
from cptq.types.samples import build_ratios

#: of the free disk, how much the hidden states of one text may take
DISK_SHARE = 0.5
#: metric -> the quantile of the KL over tokens
TAILS = {"kl_p99": 0.99, "kl_p99.9": 0.999}

Numbers = np.ndarray[Any, Any]


@dataclass(kw_only=True)
class Kept:
    """A baseline's last hidden states on the windows of one text, and its head."""

    fingerprint: str
    path: Path
    shape: tuple[int, int]  # windows, predictions
    emit: Emit
    name: str
    head: nn.Module | None = None
    states: np.memmap[Any, np.dtype[np.float32]] | None = None
    done: int = 0

    def __call__(self, head: nn.Module, hidden_BTC: Tensor, labels_BT: Tensor) -> None:
        """Keep one batch."""
        if self.done == 0 and not self._make_room(hidden_BTC.shape[-1]):
            self.done = -1
        if self.done < 0 or self.states is None:
            return
        self.head = head
        end = self.done + len(hidden_BTC)
        self.states[self.done : end] = hidden_BTC.float().cpu().numpy()
        self.done = end

    def _make_room(self, width: int) -> bool:
        shape = (*self.shape, width)
        needed, free = 4 * int(np.prod(shape)), shutil.disk_usage(self.path.parent).free
        if needed > DISK_SHARE * free:
            message = (
                f"no KL to the baseline: its outputs take {needed:,} bytes of temporary disk, and "
                f"{free:,} are free; --limit asks for less text"
            )
            self.emit(Notice(kind="skipped", subject=self.name, message=message))
            return False
        self.states = np.memmap(self.path, dtype=np.float32, mode="w+", shape=shape)
        return True


@dataclass(kw_only=True)
class Keeper:
    """Stands beside the baseline; `folder` is a temporary directory."""

    folder: Path
    kept: dict[str, Kept] = field(default_factory=dict)

    def open(self, name: str, windows_NT: Tensor, emit: Emit) -> Witness | None:
        """Keep what the baseline makes of this text."""
        windows, seqlen = windows_NT.shape
        self.kept[name] = Kept(
            fingerprint=digest_tokens(windows_NT),
            path=self.folder / f"{len(self.kept)}.float32",
            shape=(windows, seqlen - 1),
            emit=emit,
            name=name,
        )
        return self.kept[name]

    def results(self, like: EvalResult) -> list[EvalResult]:
        """None: the baseline is not compared with itself."""
        return []


@dataclass(kw_only=True)
class Comparer:
    """Stands beside the model, with what the baseline's keeper has."""

    kept: dict[str, Kept]
    found: Compared | None = None

    def open(self, name: str, windows_NT: Tensor, emit: Emit) -> Witness | None:
        """Compare on this text, if the baseline saw the same tokens."""
        self.found = None
        kept = self.kept.get(name)
        if kept is None or kept.done < 0:
            return None
        if kept.fingerprint != digest_tokens(windows_NT):
            message = "no KL to the baseline: the two models do not see the same tokens"
            emit(Notice(kind="skipped", subject=name, message=message))
            return None
        self.found = Compared(kept=kept, emit=emit)
        return self.found

    def results(self, like: EvalResult) -> list[EvalResult]:
        """KL, agreement and flips on the text opened last; none where nothing was compared."""
        return self.found.results(like) if self.found is not None and self.found.kl else []


@dataclass(kw_only=True)
class Compared:
    """Of every predicted token: the KL, and whether the two agree and flip."""

    kept: Kept
    emit: Emit
    kl: list[Tensor] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)
    flip: list[Tensor] = field(default_factory=list)
    rows: int = 0

    def __call__(self, head: nn.Module, hidden_BTC: Tensor, labels_BT: Tensor) -> None:
        """Compare one batch of windows."""
        states, base = self.kept.states, self.kept.head
        assert states is not None
        assert base is not None
        if self.rows == 0 and not self._same_vocabulary(head, hidden_BTC):
            self.rows = -1
        if self.rows < 0:
            return
        end = self.rows + len(hidden_BTC)
        base_BTC = torch.from_numpy(states[self.rows : end].copy()).to(hidden_BTC)
        self.rows = end
        kl, same, flip = compare_tokens(base, base_BTC, head, hidden_BTC, labels_BT)
        self.kl.append(kl)
        self.same.append(same)
        self.flip.append(flip)

    def _same_vocabulary(self, head: nn.Module, hidden_BTC: Tensor) -> bool:
        assert self.kept.states is not None
        assert self.kept.head is not None
        first = torch.from_numpy(self.kept.states[:1, :1].copy()).to(hidden_BTC)
        sizes = self.kept.head(first).shape[-1], head(hidden_BTC[:1, :1]).shape[-1]
        if sizes[0] != sizes[1]:
            message = f"no KL to the baseline: vocabularies of {sizes[1]:,} and {sizes[0]:,} tokens"
            self.emit(Notice(kind="skipped", subject=self.kept.name, message=message))
        return bool(sizes[0] == sizes[1])

    def results(self, like: EvalResult) -> list[EvalResult]:
        """The five numbers, described as the perplexity `like` is."""
        kl_NT = torch.cat(self.kl).numpy()
        whole = np.full(len(kl_NT), kl_NT.shape[1])
        sums = [torch.cat(part).double().sum(1).numpy() for part in (self.kl, self.same, self.flip)]
        agreement = (("kl", "nats", False), ("top1_agree", "of tokens", True))
        kinds = (*agreement, ("flips", "of tokens", False))
        means = [
            _described(like, metric, unit, higher, ratio(sum_N, whole), sum_N, whole)
            for (metric, unit, higher), sum_N in zip(kinds, sums, strict=True)
        ]
        tails = [
            _described(like, metric, "nats", False, quantile(kl_NT, level))
            for metric, level in TAILS.items()
        ]
        return [means[0], *tails, *means[1:]]


def _described(
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


def compare_tokens(
    base_head: nn.Module,
    base_BTC: Tensor,
    head: nn.Module,
    hidden_BTC: Tensor,
    labels_BT: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(KL in nats float64, same likeliest token, exactly one right), each (batch, tokens), on CPU.

    Both heads give logits over the same vocabulary.
    """
    size = positions_at_once(head, hidden_BTC, LOGIT_ELEMENTS // 2)
    parts = [
        _compare_piece(base_head(base).float(), head(own).float(), labels)
        for base, own, labels in zip(
            base_BTC.split(size, 1),
            hidden_BTC.split(size, 1),
            labels_BT.split(size, 1),
            strict=True,
        )
    ]
    kl, same, flip = (torch.cat(values, 1).cpu() for values in zip(*parts, strict=True))
    return kl, same, flip


def _compare_piece(
    base_BTV: Tensor, own_BTV: Tensor, labels_BT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    base, own = base_BTV.log_softmax(-1), own_BTV.log_softmax(-1)
    kl_BT = (base.exp() * (base - own)).sum(-1, dtype=torch.float64).clamp(min=0)
    base_top, own_top = base_BTV.argmax(-1), own_BTV.argmax(-1)
    flip = (base_top == labels_BT) != (own_top == labels_BT)
    return kl_BT, base_top == own_top, flip

"""Tune a compressed model end to end: gradient steps on what its format leaves free.

After rounding, the integer codes q and zero points z stay as they are. Free are the scales s of the
compressed linears and the vectors v that stay dense (weights of norms, biases). They follow the
gradient of the divergence from the dense model,

    min over s, v of    sum over output rows of KL(p_dense || p(s, v)),      W = (q - z) s,

which sees all layers at once, where a compressor sees one layer's outputs. For models that give
plain numbers (encoders, regressors) the divergence is that of `calibration.objective`.

Sources: EfficientQAT's end-to-end phase (Chen et al., arXiv 2407.11062, section 3.3), which trains
scales at frozen codes; mlx-lm's DWQ, which trains scales and biases by KL to the dense logits.
Departures:

- The loss is the divergence from the dense model, not the likelihood of the text: it needs no
  labels, works for classifiers and encoders, and does not teach the model the calibration text.
- A step is relative: s = s_0 e^r and v = v_0 + rms(v_0) r, with Adam on r. So scales keep their
  sign and never reach 0, and layers of any size move alike. Adam's rate is `RATES` times
  |W - Q| / |W| of the layer, for v the mean of all layers': noise in a gradient must not move
  weights by more than rounding did, and there is more to gain where fewer bits were left. From
  `WIDTH` inputs on it falls with their number, as all of a row move by the same step and what they
  do to an output adds up (muP: Yang et al., arXiv 2203.03466, table 8). It falls along a
  cosine. Where the mean is a worse model than the first, steps go on from the best one with a
  third of the rate.
- What is judged and kept is a running mean of r, to which a step adds 1/`AVERAGED` (Polyak and
  Juditsky, SIAM J. Control Optim. 30, 1992): steps of few tokens wander about the minimum. On
  smollm2-135m at 67 MB the divergence on held-out text after 16, 32, 48, 64 of 256 steps was
  0.1205, 0.1181, 0.1196, 0.1188 without and 0.1202, 0.1180, 0.1166, 0.1165 with it, from 0.1224.
- Norms and biases move as well, as stored in the checkpoint's type.
- The model always computes with s and v as they are stored, rounded to their types and bounds
  (`layer.round_layer_scales`); the gradient passes through the rounding as if it were not there.
  So the states that are compared are those that would ship.
- Each weight's gradient is folded into that of its scales as soon as it is complete
  (`compression.tuned_parts`): weights need no graph of their own.

The best mean on held-out text is kept, judged every `CHECK_EVERY` steps. If it is not better than
the beginning there, or worse on a second text that chose nothing, the model is left as it began.

Cost: per step of `STEP_TOKENS` tokens a forward and a backward pass of the compressed model, as
much as three forward passes, and of the dense one a forward pass when a batch comes first, later
its head alone (to keep logits would take more memory than the model); with a look at the held-out
text every `CHECK_EVERY` steps, a quarter of a pass more.
Memory: the dense weights once more, on the model's device (`copy_dense`; what is never changed is
shared), one hidden state per token of the text, the activations of one step, the gradient of one
weight at a time, six numbers per scale, and the dense outputs for the held-out text.
Limits: codes do not move, so what is lost by a code stays lost (docs/compression.md says what came
of moving them); embeddings, heads, routers and vectors of zeros are frozen. The gain is that on
text like the calibration text. Rates were measured on stories260k at 2 to 4 bits, on smollm2-135m
at 2 to 6 and on encoders of up to 384 inputs. `seconds` may end it early, and then the result
depends on the machine's speed.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cptq.calibration.batches import Batch, split_batches, stack_rows
from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.calibration.objective import Objective
from cptq.calibration.replay import BlockReplay, forward
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.spill import Kept
from cptq.checkpoint.weights import get_weight
from cptq.compression.layer import measure_layer
from cptq.compression.streams import Stream
from cptq.compression.tuned_parts import RATES, Free, Scales, find_free_vectors, list_free
from cptq.errors import CalibrationError
from cptq.types import CompressedLayer, Emit, Progress

#: tokens of one step
STEP_TOKENS = 512
#: steps at most, and between two looks at the held-out text
STEPS, CHECK_EVERY = 512, 16
#: steps that a running mean remembers
AVERAGED = 32
#: what is left of it after steps that led to a worse model than the first
CUT = 1 / 3
#: the gradients of a model that is confident of its classes are small
EPSILON = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class Tuned:
    """What became of a model.

    `before` and `after` are the divergences of each held-out row of the text that judges, `after`
    that of the best state on the text that chooses. `dense` names the dense tensors that changed.
    `steps` were made of `planned`; `in_time`: time did not end them. Where that state is no better,
    `kept` is False and the model and its layers are as they were.
    """

    layers: list[CompressedLayer]
    dense: tuple[str, ...]
    before: Tensor
    after: Tensor
    steps: int
    planned: int
    in_time: bool
    kept: bool


def copy_dense(model: LoadedModel) -> LoadedModel:
    """Return the dense model, which stays dense; what is never changed in place is shared."""
    changed = {id(vector) for vector in find_free_vectors(model).values()}
    shared = {id(p): p for p in model.module.parameters() if id(p) not in changed}
    module, resident = copy.deepcopy((model.module, model.resident), shared)
    return replace(model, module=module, resident=resident)


def list_steps(model: LoadedModel, calibration: Calibration) -> list[Batch]:
    """Return the text to learn from, a batch for each step."""
    windows, bos = model.kind == "causal-lm", calibration.record.bos
    return cut_steps(calibration.batches, windows=windows, bos=bos)


def cut_steps(batches: Sequence[Batch], *, windows: bool, bos: bool) -> list[Batch]:
    """Cut calibration text into batches of at most `STEP_TOKENS` tokens, of whole rows if they fit.

    Args:
        batches: the text.
        windows: rows are running text, so that longer ones are cut.
        bos: every row begins with a BOS; then so does every piece.
    """
    rows = split_batches(batches, tokens=1)
    if windows:
        rows = [piece for row in rows for piece in _cut_row(row, bos)]
    return stack_rows(rows, STEP_TOKENS)


def _cut_row(row: Batch, bos: bool) -> list[Batch]:
    ids = row["input_ids"]
    if ids.shape[1] <= STEP_TOKENS:
        return [row]
    first, rest = ids[:, : int(bos)], ids[:, int(bos) :]
    count = math.ceil(rest.shape[1] / (STEP_TOKENS - int(bos)))
    pieces = [torch.cat([first, part], 1) for part in rest.tensor_split(count, 1)]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in pieces]


def tune(
    model: LoadedModel,
    dense: LoadedModel,
    layers: Sequence[CompressedLayer],
    batches: Sequence[Batch],
    objective: Objective,
    choose: DivergenceFromDense,
    judge: DivergenceFromDense | None,
    *,
    float16_scales: bool = False,
    steps: int = STEPS,
    seconds: float = math.inf,
    seed: int = 0,
    emit: Emit,
) -> Tuned:
    """Tune scales, norms and biases; afterwards `model` computes with the best state found.

    Args:
        model: computes with the compressed weights.
        dense: a copy from before it was compressed (`copy_dense`).
        layers: the compressed linears.
        batches: text to learn from, one step each, again and again in seeded order.
        objective: what divergence is.
        choose: measures the model on text that is not learnt from; chooses the best state.
        judge: measures it on a second such text; a state that is worse there is not kept.
        float16_scales: as in `compress_layer`.
        steps: how many.
        seconds: no step begins after so much time.
        seed: of the order of the batches.
        emit: receives progress with the divergence on held-out text.
    """
    if model.resident is not None:
        model.resident.pin()
    free = list_free(model, layers, float16_scales, RATES[objective.row])
    judges = [choose, *([judge] if judge else [])]
    start = [part.store(part.r) for part in free]
    before = [text.measure_rows() for text in judges]
    search = _Search(free, choose, float(before[0].mean()))
    pace = _Pace(steps, seconds)
    teacher = _Teacher(dense, batches, objective)
    made, order = 0, _repeat(len(batches), seed)
    optimizer = torch.optim.Adam([{"params": [part.r]} for part in free], eps=EPSILON)
    with _receive_gradients(free):
        while made < pace.estimate_steps(made):
            _set_rates(optimizer, free, pace.anneal(made))
            optimizer.zero_grad()
            index = next(order)
            _backpropagate(model, batches[index], teacher.compute_reference(index), objective)
            optimizer.step()
            _load(free, [part.store(part.r) for part in free])
            search.follow()
            made += 1
            if made % CHECK_EVERY == 0:
                search.look()
                message = f"{search.last:.4g} {choose.unit} on held-out text"
                emit(Progress(stage="tune", done=made, total=pace.total, message=message))
                if search.worse:
                    search.return_to_best()
                    optimizer.state.clear()
                    pace.share *= CUT
    if made % CHECK_EVERY:
        search.look()
    _load(free, search.best)
    after = _measure_rows(judges[-1])
    kept = search.improved and bool(after.mean() <= before[-1].mean())
    final = search.best if kept else start
    _load(free, final)
    moved = [not torch.equal(*pair) for pair in zip(final, start, strict=True)]
    return Tuned(
        layers=[part.layer for part in free if isinstance(part, Scales)],
        dense=tuple(x.name for x, yes in zip(free, moved, strict=True) if yes and x.name),
        before=before[-1],
        after=after,
        steps=made,
        planned=steps,
        in_time=pace.total == steps,
        kept=kept,
    )


def _set_rates(optimizer: torch.optim.Adam, free: Sequence[Free], share: float) -> None:
    for part, group in zip(free, optimizer.param_groups, strict=True):
        group["lr"] = part.rate * share


def _measure_rows(text: DivergenceFromDense) -> Tensor:
    """Return the divergence of each row; infinite where the model's output is not finite."""
    try:
        return text.measure_rows()
    except CalibrationError:
        return torch.full(text.window_R.shape, math.inf, dtype=torch.float64)


class _Pace:
    """How many steps there will be, and how large: Adam's step falls along a cosine to 0.

    If the time will not suffice for all steps, fewer are planned, so that the steps are small at
    the end in any case. `share`: of the rate that is in use.
    """

    def __init__(self, steps: int, seconds: float) -> None:
        self.total, self.share = steps, 1.0
        self._seconds, self._began = seconds, time.perf_counter()

    def estimate_steps(self, made: int) -> int:
        """Return how many steps there will be, by the time that those `made` took."""
        spent = time.perf_counter() - self._began
        if spent > self._seconds:
            self.total = min(self.total, made)
        elif made and made % CHECK_EVERY == 0:  # then a share of looks is counted
            self.total = min(self.total, max(made, int(made * min(self._seconds / spent, 1e9))))
        return self.total

    def anneal(self, made: int) -> float:
        """Return the size of the next step as a share of the first one's."""
        return self.share * 0.5 * (1 + math.cos(math.pi * made / self.total))


class _Search:
    """The running mean of the states, and the best that it ever was on the text that chooses."""

    def __init__(self, free: list[Free], choose: DivergenceFromDense, before: float) -> None:
        self._free, self._choose, self._before = free, choose, before
        self._least = self.last = before
        self._means = [part.r.clone() for part in free]
        self._steps = 0
        self._keep(self._store())

    def _store(self) -> list[Tensor]:
        return [part.store(mean) for part, mean in zip(self._free, self._means, strict=True)]

    def _keep(self, state: list[Tensor]) -> None:
        self.best, self._changes = state, [mean.clone() for mean in self._means]

    @property
    def improved(self) -> bool:
        """Whether some state was better than the first."""
        return self._least < self._before

    @property
    def worse(self) -> bool:
        """Whether the last state was worse than the first."""
        return not self.last <= self._before

    def follow(self) -> None:
        """Take a step into the mean."""
        self._steps += 1
        share = max(1 / self._steps, 1 / AVERAGED)
        for part, mean in zip(self._free, self._means, strict=True):
            mean.lerp_(part.r, share)

    def look(self) -> None:
        """Measure the model at the mean."""
        now = [part.store(part.r) for part in self._free]
        state = self._store()
        _load(self._free, state)
        self.last = float(_measure_rows(self._choose).mean())
        _load(self._free, now)
        if self.last < self._least:
            self._least = self.last
            self._keep(state)

    def return_to_best(self) -> None:
        """Go on from the best state."""
        self._steps = 0
        for part, mean, change in zip(self._free, self._means, self._changes, strict=True):
            part.r.copy_(change)
            mean.copy_(change)  # it may not be finite, and then no step would mend it
        _load(self._free, self.best)


@torch.no_grad()
def _load(free: Sequence[Free], state: Sequence[Tensor]) -> None:
    for part, value in zip(free, state, strict=True):
        part.load(value)


@contextmanager
def _receive_gradients(free: Sequence[Free]) -> Iterator[None]:
    """Ask for the gradients of what is free alone, and drop each once it is received."""
    with ExitStack() as stack:
        for part in free:
            part.parameter.requires_grad_(True)
            stack.callback(part.parameter.requires_grad_, False)
            hook = _make_hook(part.receive)
            stack.callback(part.parameter.register_post_accumulate_grad_hook(hook).remove)
        yield


def _make_hook(receive: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        with torch.no_grad():
            receive(parameter.grad)
        parameter.grad = None

    return hook


def _repeat(count: int, seed: int) -> Iterator[int]:
    """Yield the numbers below `count` in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


class _Teacher:
    """What the dense model gives for each batch.

    A batch runs through its blocks once. What the last block gives is kept, and what follows it, a
    head with a row of numbers for every token, is computed again.
    """

    def __init__(self, dense: LoadedModel, batches: Sequence[Batch], objective: Objective) -> None:
        self._batches, self._objective = batches, objective
        self._spill, self._replay = dense.spill, BlockReplay(dense, list(batches))
        self._last: dict[int, Kept] = {}

    @torch.no_grad()
    def compute_reference(self, index: int) -> Tensor:
        """Return what the divergence of a batch is measured from."""
        if index not in self._last:
            for hidden in self._replay.walk(index):
                last = hidden
            self._last[index] = self._spill.keep(last)
        output = self._replay.finish(self._last[index].get(), index)
        wanted_RV = self._objective.select_rows(output, self._batches[index])
        return self._objective.compute_reference(wanted_RV)


def _backpropagate(
    model: LoadedModel, batch: Batch, reference_RV: Tensor, objective: Objective
) -> None:
    """Send the gradient of the divergence, summed over the output rows, back through the model."""
    with torch.enable_grad():
        z_RV = objective.select_rows(forward(model, batch), batch)
    z_RV.backward(objective.compute_gradient(reference_RV, z_RV).to(z_RV.dtype))


def measure_errors(
    model: LoadedModel,
    dense: LoadedModel,
    layers: Sequence[CompressedLayer],
    held_out: Sequence[Batch],
) -> list[CompressedLayer]:
    """Return the layers with their errors as they are now, the outputs' on `held_out` text.

    `model` computes with the layers. Without text the errors of outputs are unknown.
    """
    found = {layer.spec.name: layer for layer in layers}
    stream = Stream(model, held_out) if held_out else None
    for block in range(len(model.blocks)):
        units = [u for u in model.units if u.block == block and u.layers[0].name in found]
        for moments in stream.walk(block, [units], in_order=False) if stream else [{}]:
            for unit in units:
                H_II = moments[unit.name].H_II if moments else None
                for spec in unit.layers:
                    W_OI = get_weight(dense.linear(spec.name)).float()
                    found[spec.name] = measure_layer(found[spec.name], W_OI, H_II)
    return list(found.values())

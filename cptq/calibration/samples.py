"""One pass over the calibration text that keeps, for every linear, a sample of its tokens.

At randomly chosen token positions, the same for all layers, it keeps the input row x (in,) and the
gradient row g (out,) of sum(d . z) over the output rows by the linear's output y, with z the
model's output and d a random direction of the right covariance (cptq.calibration.objective). From
these, for a weight change dW, dy = dW x and

    KL per output row ~ 1/2 sum_t E (g_t . dy_t)^2 / output rows       (true Fisher, token by token)

Products of different tokens' errors (t != t') are dropped. For metrics that compare representations
it also keeps inputs and outputs of every linear and block at fewer tokens (`LayerActivations`).

Method: forward hooks on the linears. No parameter needs a gradient; the embedding's output is made
to, so that a backward pass costs no more than a forward one. An input that several linears read
(q/k/v) is recognised by identity and kept once. A linear that is called more than once in a forward
pass keeps rows of every call; gradients, which arrive in the reverse order, go to the slot of their
call. Second moments E x x^T are summed over ALL tokens of the pass where they fit.

Cost: a forward pass, plus a backward pass for gradients where requested;
memory: rows x (inputs + outputs of all layers) x 4 bytes on the CPU, capped (`MEMORY_BYTES`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cptq.calibration.batches import Batch, count_tokens, split_batches
from cptq.calibration.objective import Objective, mask_real_tokens
from cptq.calibration.replay import forward, run_body
from cptq.checkpoint.model import LoadedModel
from cptq.errors import CalibrationError
from cptq.numerics.hessian import SecondMoment
from cptq.types import Emit, LayerSpec, Notice, Progress

#: token rows kept per layer
ROWS = 1024
#: most tokens that flow through the model in a pass
PASS_TOKENS = 4096
#: memory that the kept rows may take
MEMORY_BYTES = 4 << 30
#: largest layer input whose full second moment is summed in the pass
MOMENT_FEATURES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """What a pass keeps: gradients with the input rows they belong to, second moments, activations.

    `activations` is the number of tokens at which inputs and outputs are kept.
    """

    gradients: bool = False
    moments: bool = False
    activations: int = 0

    def __or__(self, other: SampleRequest) -> SampleRequest:
        """Return the request that covers both."""
        return SampleRequest(
            **{f: max(getattr(self, f), getattr(other, f)) for f in self.__dataclass_fields__}
        )


@dataclass(slots=True, kw_only=True, eq=False)
class LayerSample:
    """Sampled rows of one linear, float32 on the CPU.

    x_TI: input rows, none without gradients; g_TO: gradient rows, None where not requested.
    Layers that read the same input share `x_TI` and `moment`. `scale` turns a sum over the rows
    into nats per output row: tokens seen / (rows kept * output rows).
    """

    x_TI: Tensor
    g_TO: Tensor | None
    moment: SecondMoment | None
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerActivations:
    """The same tokens before and after one linear: x_TI, y_TO, float32 on the CPU."""

    x_TI: Tensor
    y_TO: Tensor


@dataclass(slots=True, kw_only=True, eq=False)
class Samples:
    """The outcome of a pass. `output_rows` is how many rows the model's output had.

    `activations` and `block_outputs` (rows of each block) hold the same tokens, where requested.
    """

    layers: dict[str, LayerSample]
    activations: dict[str, LayerActivations]
    block_outputs: list[Tensor]
    tokens: int
    output_rows: int


def collect_samples(
    model: LoadedModel,
    rows: Sequence[Batch],
    objective: Objective,
    request: SampleRequest,
    *,
    seed: int,
    emit: Emit,
    keep: int = ROWS,
    least: int = 0,
    tokens: int = PASS_TOKENS,
    memory_bytes: int = MEMORY_BYTES,
) -> Samples:
    """Run the pass.

    Args:
        model: the dense model; left unchanged.
        rows: calibration batches; the first ones are used until `tokens` are reached.
        objective: how the model is judged.
        request: what to keep.
        seed: seed of the positions and of the directions.
        emit: takes progress, and a notice when memory allows fewer rows than `keep`.
        keep: rows to keep per layer.
        least: rows that are kept whatever the memory.
        tokens: most tokens that flow through the model.
        memory_bytes: about how much the kept rows may take.

    Raises:
        CalibrationError: no tokens, or an activation or a gradient is NaN or infinite.
    """
    batches = split_batches(take_batches(rows, tokens))
    total = count_tokens(batches)
    if total == 0:
        raise CalibrationError("the calibration data holds no tokens")
    keep = min(_limit_rows(model, request, keep, least, memory_bytes, emit), total)
    collector = _Collector(model, request, seed, keep)
    with collector.install_hooks():
        done = output_rows = 0
        for step, batch in enumerate(batches):
            count = count_tokens([batch])
            # differences of rounded running totals: the quotas add up to exactly `keep`
            quota = (done + count) * keep // total - done * keep // total
            output_rows += collector.run(batch, objective, quota)
            done += count
            message = f"{done:,} of {total:,} tokens"
            emit(Progress(stage="samples", done=step + 1, total=len(batches), message=message))
    return Samples(
        layers=collector.join_samples(output_rows),
        activations=collector.activations.join_layers(),
        block_outputs=collector.activations.join_blocks(),
        tokens=total,
        output_rows=output_rows,
    )


def take_batches(rows: Sequence[Batch], tokens: int) -> list[Batch]:
    """Return the first batches that hold `tokens` together, or all there are."""
    chosen: list[Batch] = []
    done = 0
    for batch in rows:
        if done >= tokens:
            break
        chosen.append(batch)
        done += count_tokens([batch])
    return chosen


def _limit_rows(
    model: LoadedModel, request: SampleRequest, keep: int, least: int, memory_bytes: int, emit: Emit
) -> int:
    """Return the rows that fit into memory.

    Every fused unit keeps its input once and the gradients of each of its outputs.
    """
    floats = sum(unit.layers[0].shape[1] for unit in model.units)
    outputs = sum(layer.shape[0] for unit in model.units for layer in unit.layers)
    floats += outputs * (int(request.gradients))
    fits = max(memory_bytes // (4 * max(floats, 1)), 1)
    if fits >= keep or not request.gradients:
        return keep
    emit(
        Notice(
            kind="info",
            subject="sensitivity samples",
            message=f"{max(fits, least)} token rows per layer instead of {keep}, to stay near"
            f" {memory_bytes / 2**30:.1f} GiB",
        )
    )
    return max(fits, least)


def is_finite(X: Tensor) -> bool:
    """Return whether no number is NaN or infinite; one pass, where `isfinite` takes several."""
    return X.numel() == 0 or all(math.isfinite(float(end)) for end in X.detach().aminmax())


def build_not_finite_error(what: str) -> CalibrationError:
    """Return the error for `what`, a noun phrase."""
    return CalibrationError(
        f"{what} holds NaN or infinity on the calibration text",
        hint="run in --dtype float32, or check the checkpoint for damaged weights",
    )


class RowSampler:
    """Choose the token rows that a pass keeps, the same ones in every layer.

    The rows of the whole pass are numbered 0 .. keep - 1 in the order in which they are drawn.
    `few` of these numbers, evenly spaced, are the rows whose activations are kept as well.

    Args:
        seed: seed of the draw.
        keep: rows drawn in the whole pass.
        few: how many of them have their activations kept.
    """

    def __init__(self, seed: int, keep: int, few: int) -> None:
        self._draw = torch.Generator().manual_seed(seed)
        few = min(few, keep)
        self._few_numbers = torch.linspace(0, max(keep - 1, 0), few).round().long()
        #: number of the current batch's first row, and how many rows it has
        self._first = self._quota = 0
        self._rows: dict[int, Tensor] = {}
        self._few: dict[int, Tensor] = {}

    def draw_batch(self, mask_BT: Tensor, quota: int) -> None:
        """Draw `quota` of the next batch's real tokens."""
        self._first, self._quota = self._first + self._quota, quota
        real = mask_BT.flatten().nonzero().flatten().cpu()
        chosen = torch.randperm(len(real), generator=self._draw)[:quota]
        # keyed by the number of rows that an input with one row per token has
        self._rows = {mask_BT.numel(): real[chosen.sort().values]}
        self._few = {}

    def get_rows(self, length: int) -> Tensor:
        """Return the row indices to keep of an input with `length` rows.

        An input that has no row per token (one per example, or per token routed to an expert) gets
        positions of its own, drawn once per batch and length, at least one.
        """
        if length not in self._rows:
            order = torch.randperm(length, generator=self._draw)
            self._rows[length] = order[: max(1, self._quota)].sort().values
        return self._rows[length]

    def get_few(self, length: int) -> Tensor:
        """Return those of the row indices whose activations are kept."""
        if length not in self._few:
            rows = self.get_rows(length)
            # numbers within this batch; a shorter input may have fewer rows than the quota
            local = self._few_numbers - self._first
            self._few[length] = rows[local[(local >= 0) & (local < min(self._quota, len(rows)))]]
        return self._few[length]


@dataclass(slots=True, eq=False)
class _Kept:
    """Row pieces of one linear while the pass runs."""

    x: list[Tensor] = field(default_factory=list)
    g: list[Tensor | None] = field(default_factory=list)
    moment: SecondMoment | None = None
    seen: int = 0


class _Collector:
    """The hooks of a pass and what they keep; one instance per pass."""

    def __init__(self, model: LoadedModel, request: SampleRequest, seed: int, keep: int) -> None:
        self._model = model
        self._request = request
        self._specs = [layer for unit in model.units for layer in unit.layers]
        self._kept = {spec.name: _Kept() for spec in self._specs}
        self._sampler = RowSampler(seed, keep, request.activations)
        self._directions = torch.Generator().manual_seed(seed + 1)
        self._mask = torch.empty(0)
        self._last: tuple[Tensor | None, str] = (None, "")
        self.activations = _ActivationRecorder(model, self._sampler)

    @contextmanager
    def install_hooks(self) -> Iterator[None]:
        """Register the hooks and freeze the parameters; restore everything afterwards."""
        module = self._model.module
        flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
        with ExitStack() as stack:
            stack.callback(lambda: [p.requires_grad_(flag) for p, flag in flags])
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            for handle in self._register():
                stack.callback(handle.remove)
            stack.enter_context(torch.set_grad_enabled(self._request.gradients))
            yield

    def _register(self) -> Iterator[Any]:
        if self._request.gradients:
            embedding: nn.Module = self._model.module.get_input_embeddings()  # type: ignore[operator]
            yield embedding.register_forward_hook(_detach_as_leaf)
        for spec in self._specs:
            hook = self._make_layer_hook(spec)
            yield self._model.linear(spec.name).register_forward_hook(hook)
        if self._request.activations:
            yield from self.activations.register()

    def run(self, batch: Batch, objective: Objective, quota: int) -> int:
        """Run one micro-batch; return the rows of its output, 0 where no gradient is needed."""
        self._mask = mask_real_tokens(batch)
        self._last = (None, "")
        self._sampler.draw_batch(self._mask, quota)
        if not self._request.gradients:
            self._check(run_body(self._model, batch))
            return 0
        z_RV = objective.select_rows(forward(self._model, batch), batch)
        self._check(z_RV)
        z_RV.backward(objective.draw_direction(z_RV, self._directions).to(z_RV.dtype))
        return z_RV.shape[0]

    @staticmethod
    def _check(output: Tensor) -> None:
        if not is_finite(output):
            raise build_not_finite_error("the model's output")

    def _choose_rows(self, length: int) -> Tensor:
        """Return the rows to keep of an input with `length` rows; none without gradients."""
        return self._sampler.get_rows(length)[: None if self._request.gradients else 0]

    def _make_layer_hook(self, spec: LayerSpec) -> Any:
        kept = self._kept[spec.name]

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x_MI = args[0].detach().reshape(-1, args[0].shape[-1])
            index = self._choose_rows(len(x_MI))
            tokens = len(x_MI) == self._mask.numel()
            kept.seen += int(self._mask.sum()) if tokens else len(x_MI)
            self._keep_input(kept, spec, args[0], x_MI, index)
            kept.g.append(None)
            if output.requires_grad:
                output.register_hook(self._make_gradient_hook(kept, spec, len(kept.g) - 1, index))

        return hook

    def _keep_input(
        self, kept: _Kept, spec: LayerSpec, x: Tensor, x_MI: Tensor, index: Tensor
    ) -> None:
        if self._last[0] is x:  # q, k and v read the same tensor: keep it once
            owner = self._kept[self._last[1]]
            kept.x.append(owner.x[-1])
            kept.moment = owner.moment
            return
        rows = x_MI[index.to(x_MI.device)].float().cpu()
        if not is_finite(rows):
            raise build_not_finite_error(f"the input of layer {spec.name}")
        kept.x.append(rows)
        self._last = (x, spec.name)
        if self._request.moments and x_MI.shape[1] <= MOMENT_FEATURES:
            kept.moment = kept.moment or SecondMoment(x_MI.shape[1], x_MI.device)
            mask = self._mask.flatten()
            kept.moment.add(x_MI[mask] if len(mask) == len(x_MI) else x_MI)

    def _make_gradient_hook(self, kept: _Kept, spec: LayerSpec, slot: int, index: Tensor) -> Any:
        def hook(gradient: Tensor) -> None:
            g_MO = gradient.reshape(-1, gradient.shape[-1])
            rows = g_MO[index.to(g_MO.device)].float().cpu()
            if not is_finite(rows):
                raise build_not_finite_error(f"the gradient of layer {spec.name}")
            kept.g[slot] = rows

        return hook

    def join_samples(self, output_rows: int) -> dict[str, LayerSample]:
        """Return the joined pieces by layer name; layers that never ran are left out."""
        joined: dict[tuple[int, ...], Tensor] = {}
        result = {}
        for spec in self._specs:
            kept = self._kept[spec.name]
            if not kept.x:
                continue
            key = tuple(id(part) for part in kept.x)
            if key not in joined:
                joined[key] = torch.cat(kept.x)
            result[spec.name] = LayerSample(
                x_TI=joined[key],
                g_TO=_join_gradients(kept.g, kept.x, spec) if self._request.gradients else None,
                moment=kept.moment,
                scale=kept.seen / max(len(joined[key]) * output_rows, 1),
            )
            kept.g = []  # half the memory is in the pieces
        return result


def _join_gradients(parts: list[Tensor | None], x: list[Tensor], spec: LayerSpec) -> Tensor:
    """Join gradient rows; zeros for a call that the output does not depend on."""
    width = spec.shape[0]
    return torch.cat(
        [torch.zeros(len(r), width) if g is None else g for g, r in zip(parts, x, strict=True)]
    )


def _detach_as_leaf(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Make the embedding's output the leaf that gradients flow back to."""
    # a leaf must not be changed in place by what follows: hand on a copy
    return output.detach().requires_grad_().clone()


@dataclass(slots=True, eq=False)
class _ActivationPieces:
    x: list[Tensor] = field(default_factory=list)
    y: list[Tensor] = field(default_factory=list)


class _ActivationRecorder:
    """The hooks that keep inputs and outputs of linears, and outputs of blocks, at a few tokens."""

    def __init__(self, model: LoadedModel, sampler: RowSampler) -> None:
        self._model = model
        self._sampler = sampler
        self._layers: dict[str, _ActivationPieces] = {}
        self._blocks: list[list[Tensor]] = [[] for _ in model.block_names]

    def register(self) -> Iterator[Any]:
        """Register the hooks; yield the handles that remove them."""
        for unit in self._model.units:
            for spec in unit.layers:
                pieces = self._layers[spec.name] = _ActivationPieces()
                hook = self._make_layer_hook(pieces, spec.name)
                yield self._model.linear(spec.name).register_forward_hook(hook)
        for block, kept in zip(self._model.blocks, self._blocks, strict=True):
            yield block.register_forward_hook(self._make_block_hook(kept))

    def _make_layer_hook(self, pieces: _ActivationPieces, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            pieces.x.append(self._select(args[0]))
            pieces.y.append(self._select(output))
            if not is_finite(pieces.y[-1]):
                raise build_not_finite_error(f"the output of layer {name}")

        return hook

    def _make_block_hook(self, kept: list[Tensor]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            kept.append(self._select(output[0] if isinstance(output, tuple) else output))

        return hook

    def _select(self, rows: Tensor) -> Tensor:
        rows_MF = rows.detach().reshape(-1, rows.shape[-1])
        return rows_MF[self._sampler.get_few(len(rows_MF)).to(rows.device)].float().cpu()

    def join_layers(self) -> dict[str, LayerActivations]:
        """Return the activations by layer name; a layer that never ran has none."""
        return {
            name: LayerActivations(x_TI=torch.cat(pieces.x), y_TO=torch.cat(pieces.y))
            for name, pieces in self._layers.items()
            if pieces.x
        }

    def join_blocks(self) -> list[Tensor]:
        """Return the output rows (tokens, width) of every block that ran, in order."""
        return [torch.cat(parts) for parts in self._blocks if parts]

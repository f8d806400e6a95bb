"""What changed weights cost on a guard text: text that did not calibrate them.

Per row of the guard text (a token of a language model, an example, a sentence), with p the dense
model's distribution and q that of the model as it is now:

    KL               sum p (ln p - ln q)              nats; 0 where the two agree
    agreement        whether both find the same class likeliest
    perplexity       exp of the mean of -ln q(next token), and the same of p; causal models alone
    cosine distance  1 - cosine of the two embeddings, = |z - z'|^2 / 2 at length 1; encoders alone
    distance         |z - z'|^2 / 2 where a head gives plain numbers

The error of a mean over rows is that over windows (`numerics.standard_error`). The two perplexities
are of the same tokens, so the error of their difference is much smaller than theirs. With P and P'
the perplexities, n and n' the nll of a row, the delta method makes a mean of it:

    P' - P  ~  mean( P' n' - P n ) + constant

An interval is mean +- t SE with t the 97.5% quantile of Student's distribution for W - 1 windows
(scipy.special.stdtrit): with 4 windows it is 3.2, not 2. That of the KL is cut off at 0, that of a
share at 0 and 1.

Cost: one forward pass; the dense model's log-probabilities are those of `divergence_from_dense`.
Limits: every second position alone is judged; windows of one document are not independent.
"""

from __future__ import annotations

import math

import torch
from scipy.special import stdtrit
from torch import Tensor

from cptq.calibration.depth import DepthError
from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.calibration.objective import Objective
from cptq.errors import CalibrationError
from cptq.numerics.standard_error import compute_standard_error
from cptq.types import GuardMeasure, GuardQuality

#: the label of a row without a next token
NONE = -1


def measure_guard(
    divergence: DivergenceFromDense, depth: DepthError, *, source: str, chose_plan: bool = False
) -> GuardQuality:
    """Return what the model as it is now lost against the dense one on the rows of `divergence`.

    Args:
        divergence: recorded while the model was dense.
        depth: recorded while the model was dense, too.
        source: what the text is, for the report.
        chose_plan: the same text decided which plan is carried out.

    Raises:
        CalibrationError: an output is NaN or infinite.
    """
    columns = [_compare(divergence.objective, *part) for part in divergence.iterate_rows()]
    by_name = {name: torch.cat([column[name] for column in columns]) for name in columns[0]}
    if not bool(torch.isfinite(by_name["divergence"]).all()):
        raise CalibrationError(
            "the compressed model's output holds NaN or infinity", hint="run in --dtype float32"
        )
    return GuardQuality(
        measures=tuple(summarize_rows(divergence.objective, by_name, divergence.window_R)),
        source=source,
        tokens=divergence.tokens,
        rows=len(divergence.window_R),
        samples=divergence.samples,
        sample_name=divergence.sample_name,
        chose_plan=chose_plan,
        depth=depth.measure(),
    )


def _compare(
    objective: Objective, reference_RV: Tensor, z_RV: Tensor, label_R: Tensor | None
) -> dict[str, Tensor]:
    """Return the numbers of each row (rows,), float64, of one batch."""
    found = {"divergence": objective.compute_divergence(reference_RV, z_RV).cpu()}
    if objective.form == "classes":
        same_R = reference_RV.argmax(-1) == z_RV.argmax(-1)
        found["agreement"] = same_R.double().cpu()
    if label_R is not None:
        known = label_R.clamp_min(0).unsqueeze(-1)
        chosen_R = z_RV.gather(-1, known).squeeze(-1).double()
        found["own"] = (torch.logsumexp(z_RV.float(), -1).double() - chosen_R).cpu()
        found["dense"] = -reference_RV.gather(-1, known).squeeze(-1).double().cpu()
        found["label"] = label_R.cpu()
    return found


def summarize_rows(
    objective: Objective, rows: dict[str, Tensor], window_R: Tensor
) -> list[GuardMeasure]:
    """Return the measures of all rows.

    Args:
        objective: how the model is judged.
        rows: "divergence", and where they apply "agreement", "own" and "dense" (nll in nats) with
            "label", each (rows,).
        window_R: the window of each row.
    """
    positive = (0, math.inf)
    if objective.form == "values":
        encoder = objective.kind == "encoder"
        name, unit = (
            ("cosine distance", "per sentence") if encoder else ("distance", objective.unit)
        )
        return [_describe_mean(name, unit, rows["divergence"], window_R, False, positive)]
    found = [
        _describe_mean("KL", objective.unit, rows["divergence"], window_R, False, positive),
        _describe_mean(
            "top-1 agreement", f"of {objective.row}s", rows["agreement"], window_R, True, (0, 1)
        ),
    ]
    if "label" in rows:
        kept = rows["label"] != NONE
        found.append(
            _describe_perplexity(rows["own"][kept], rows["dense"][kept], window_R[kept.cpu()])
        )
    return found


def _describe_mean(
    name: str,
    unit: str,
    value_R: Tensor,
    window_R: Tensor,
    higher: bool,
    bounds: tuple[float, float],
) -> GuardMeasure:
    mean = float(value_R.mean())
    error, reach = _measure_reach(value_R, window_R)
    low, high = bounds
    return GuardMeasure(
        name=name,
        unit=unit,
        value=mean,
        stderr=error,
        higher_is_better=higher,
        interval=None if reach is None else (max(low, mean - reach), min(high, mean + reach)),
    )


def _describe_perplexity(own_R: Tensor, dense_R: Tensor, window_R: Tensor) -> GuardMeasure:
    own, dense = (math.exp(min(700.0, float(nll_R.mean()))) for nll_R in (own_R, dense_R))
    own_error, _ = _measure_reach(own_R, window_R)
    dense_error, _ = _measure_reach(dense_R, window_R)
    _, reach = _measure_reach(own * own_R - dense * dense_R, window_R)
    gap = own - dense
    return GuardMeasure(
        name="perplexity",
        unit="per token",
        value=own,
        stderr=None if own_error is None else own * own_error,
        higher_is_better=False,
        interval=None if reach is None else (gap - reach, gap + reach),
        dense=dense,
        dense_stderr=None if dense_error is None else dense * dense_error,
    )


def _measure_reach(value_R: Tensor, window_R: Tensor) -> tuple[float | None, float | None]:
    """Return the standard error of a mean and half of its 95% interval; None with one window."""
    windows = len(window_R.unique())
    if windows < 2:
        return None, None
    error = compute_standard_error(value_R, window_R)
    return error, float(stdtrit(windows - 1, 0.975)) * error

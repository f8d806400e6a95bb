"""Activation sparsity: which inputs of a linear are multiplied at run time, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ActivationRule:
    """How a linear drops inputs: a label of `cptq.layouts.activations`, and its tensors by name."""

    label: str
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationRecord:
    """What `--activation-sparsity` did to a model.

    Attributes:
        method: a name of `cptq.activation_sparsity.METHODS`.
        share: of the inputs that was asked for; None of a method that takes none.
        tokens: calibration tokens that thresholds were fitted to.
        rules: {linear: label of its rule}.
        reached: {linear: share of its inputs that was dropped on those tokens}, of the rules that
            drop inputs.
        mean: `reached`, weighted by the linears' weights: the share of products that is not needed.
    """

    method: str
    share: float | None
    tokens: int
    rules: Mapping[str, str]
    reached: Mapping[str, float]
    mean: float

    @property
    def label(self) -> str:
        """The option's value: `teal:50%`, or `exact`."""
        return self.method if self.share is None else f"{self.method}:{self.share:.0%}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the manifest."""
        return {
            "method": self.method,
            "share": self.share,
            "tokens": self.tokens,
            "mean": self.mean,
            "rules": dict(self.rules),
            "reached": dict(self.reached),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ActivationRecord:
        """Read `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: it is not such data.
        """
        return cls(
            method=str(data["method"]),
            share=None if data["share"] is None else float(data["share"]),
            tokens=int(data["tokens"]),
            rules={str(name): str(label) for name, label in data["rules"].items()},
            reached={str(name): float(share) for name, share in data["reached"].items()},
            mean=float(data["mean"]),
        )

"""Areas and joint errors by hand."""

from __future__ import annotations

import pytest
import torch

from cptq.sensitivity.pruning import area, joint_relative_error


def test_area_is_the_trapezoids() -> None:
    assert area((0.3, 0.5), (2.0, 6.0)) == pytest.approx(0.3 * 1.0 + 0.2 * 4.0)


def test_joint_error_is_that_of_the_matrices_put_together() -> None:
    W, V = torch.randn(3, 4), torch.randn(5, 4)
    dW, dV = 0.1 * torch.randn(3, 4), 0.3 * torch.randn(5, 4)
    whole = torch.cat([dW, dV]).square().sum() / torch.cat([W, V]).square().sum()
    assert joint_relative_error((dW, dV), (W, V)) == pytest.approx(float(whole), rel=1e-5)
    assert joint_relative_error((torch.zeros(2, 2),), (torch.zeros(2, 2),)) == 0.0

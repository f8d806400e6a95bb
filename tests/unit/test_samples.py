from __future__ import annotations

import json
import math

import numpy as np
import pytest

from cptq.report.summary import convert_to_plain
from cptq.types import EvalResult
from cptq.types.samples import build_pairs, build_ratios, read_per_sample


def result(**fields) -> EvalResult:
    return EvalResult(
        task="t",
        version=2,
        metric="m",
        unit="u",
        higher_is_better=True,
        samples=2,
        seconds=0.5,
        **{"value": 0.5, **fields},
    )


def test_the_samples_give_the_value() -> None:
    assert build_ratios([0, 1, 1, 0]).value == 0.5
    nll, tokens = np.array([30.0, 50.0]), np.array([10, 10])
    assert build_ratios(nll, tokens, "exp").value == pytest.approx(math.exp(4))
    assert build_ratios(nll, tokens, "bits").value == pytest.approx(4 / math.log(2))
    assert build_ratios([1e6], [1], "exp").value == math.inf


def test_numbers_are_short_in_the_file() -> None:
    found = build_ratios(np.array([1.0, 1234.56789012345, 1 / 3]), np.array([7, 8, 9]))
    assert json.dumps(convert_to_plain(found)["numerators"]) == "[1, 1234.56789, 0.333333333]"
    assert json.dumps(convert_to_plain(found)["denominators"]) == "[7, 8, 9]"
    assert json.dumps(convert_to_plain(build_pairs([0.0, 1.0], [1, 0]))["labels"]) == "[0, 1]"


@pytest.mark.parametrize(
    "per_sample",
    [None, build_ratios([1, 0.25]), build_ratios([3], [4], "bits"), build_pairs([1, 0], [0.5, 0])],
)
def test_a_result_comes_back_from_its_file(per_sample) -> None:
    found = result(per_sample=per_sample, notes=("a",), stderr=0.1, data_fingerprint="f")
    data = json.loads(json.dumps(convert_to_plain(found)))
    assert EvalResult.from_dict({**data, "unknown": 1}) == found
    assert read_per_sample(data["per_sample"]) == per_sample


def test_infinity_comes_back() -> None:
    data = json.loads(json.dumps(convert_to_plain(result(value=math.inf)), allow_nan=False))
    assert EvalResult.from_dict(data).value == math.inf

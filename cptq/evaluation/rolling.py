"""Windows that roll over a text so that every token is predicted once.

Windows hold `length` tokens of input. The first predicts all its tokens, the very first of them
from a prefix token; each later window predicts the next `stride` tokens and has the `length -
stride + 1` before them as context. A stride of `length` is cheapest and gives the first tokens of a
window little context; a stride of 1 gives every token all the context there can be, at `length`
times the cost. The last window predicts what is left.

These are the windows of lm-evaluation-harness (`get_rolling_token_windows` with a context of
length - stride + 1; its `loglikelihood_rolling` always has stride = length).
"""

from __future__ import annotations

from collections.abc import Sequence

from cptq.errors import EvaluationError
from cptq.evaluation.continuations import Request


def rolling_windows(ids: Sequence[int], prefix: int, length: int, stride: int) -> list[Request]:
    """The windows over `ids`, all of which are predicted. 1 <= stride <= length."""
    whole = (prefix, *ids)
    windows, done = [], 0
    while done < len(ids):
        end = min(done + (length if done == 0 else stride), len(ids))
        begin = max(0, end - length)  # in `whole`, which is one ahead of `ids`
        windows.append(
            Request(context=whole[begin : done + 1], continuation=whole[done + 1 : end + 1])
        )
        done = end
    return windows


def checked_stride(stride: int | None, length: int) -> int:
    """The stride: as asked, else `length`.

    Raises:
        EvaluationError: it is more than `length`, so that tokens would be skipped.
    """
    if stride is not None and stride > length:
        raise EvaluationError(
            f"--stride {stride} is more than the window of {length} tokens",
            allowed=f"1 to {length}",
        )
    return stride or length

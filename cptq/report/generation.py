"""What `cptq generate` returns: a text, and how fast it was read and written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from cptq.report.formatting import format_number, format_plural, format_seconds

#: why a text ends: the model ended it, as many tokens as asked for, the end of its context
Ending = Literal["end of text", "new tokens", "context"]


def compute_rate(count: int, seconds: float) -> float | None:
    """Compute `count` per second; None of nothing, or where no time has passed."""
    return count / seconds if count > 0 and seconds > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOutcome:
    """A generated text and its times.

    Attributes:
        text: without the prompt.
        prompt_tokens: tokens read, those of a chat template included.
        new_tokens: tokens written, one that ended the text included.
        first_seconds: from the beginning of the prompt to the first token; loading is not in it.
        later_seconds: from the first token to the last.
        ending: why the text ends.
        way: what decoded it: "generate" of transformers, or cptq's "own loop".
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    first_seconds: float
    later_seconds: float
    ending: Ending
    way: str

    @property
    def prompt_rate(self) -> float | None:
        """Prompt tokens per second, over the time to the first token."""
        return compute_rate(self.prompt_tokens, self.first_seconds)

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first; None where there is one alone."""
        return compute_rate(self.new_tokens - 1, self.later_seconds)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            **asdict(self),
            "prompt_tokens_per_second": self.prompt_rate,
            "tokens_per_second": self.decode_rate,
        }

    def describe(self) -> str:
        """Return the statistics in one line."""
        parts = [
            f"prompt: {format_plural(self.prompt_tokens, 'token')}{_spell(self.prompt_rate)}",
            f"new: {format_plural(self.new_tokens, 'token')}{_spell(self.decode_rate)}",
            f"first after {format_seconds(self.first_seconds)}",
            f"ended by: {self.ending}",
            f"decoded by: {self.way}",
        ]
        return "; ".join(parts)


def _spell(rate: float | None) -> str:
    return "" if rate is None else f", {format_number(rate, 3)}/s"

"""The three shapes of output; a file of its own, so that `--help` needs no console."""

from typing import Literal

Format = Literal["human", "json", "quiet"]

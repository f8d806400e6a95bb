"""Overlap of an evaluated text with a calibration text.

Both are cut into runs of WORDS = 13 words (lower case, letters and digits only), the length by
which GPT-3's authors looked for contamination (Brown et al. 2020, appendix C); each run becomes a
64-bit hash. Tokenizers, spacing and punctuation change nothing. A row shorter than a run counts as
one if it has at least SHORTEST words, so that whole sentences of GLUE are detected.

Calibration keeps a *sketch* of its hashes, chosen by winnowing (Schleimer, Wilkerson & Aiken 2003,
section 4): of every WINDOW = 32 hashes in a row the smallest. Two texts that share a passage of at
least WORDS + WINDOW - 1 = 44 words share a hash of the sketch, whatever surrounds it; of
shorter passages about one in 16 hashes is kept. More than MOST hashes are cut down to the smallest
MOST, still a fair sample but no longer a guarantee.

All runs of the evaluated text are looked up in the sketch. `Overlap.share` is the greater of two
shares: of the calibration's sketch, and of the evaluated text's own.

Cost: a sketch of 64 samples of 512 tokens has some 1,500 hashes, 16 kB in cptq.json as base64; at
most MOST = 8,192 hashes, 88 kB. Time is linear, about a second for a million words. A chance
collision among 10^4 and 10^6 hashes of 64 bits has a probability below 10^-9.

Not seen: paraphrases, other languages, and a short row inside a longer one.
"""

from __future__ import annotations

import base64
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cptq.errors import DataError

WORDS, WINDOW, SHORTEST, MOST = 13, 32, 4, 8192
#: share from which shared passages are an overlap, and not a common phrase
ENOUGH = 0.01

Hashes = NDArray[np.uint64]
_WORD = re.compile(r"[^\W_]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that powers never vanish


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """What two texts share: `found` of the sketch's `kept` hashes, and the greater `share`."""

    found: int
    kept: int
    share: float

    @property
    def leaks(self) -> bool:
        """Whether it is more than a common phrase."""
        return self.share >= ENOUGH and self.found > 1


def hash_row(text: str) -> Hashes:
    """Hash every run of WORDS words, in order; a short text has one hash, or none."""
    words = _WORD.findall(_simplify(text))
    if len(words) < SHORTEST:
        return np.empty(0, dtype=np.uint64)
    length = min(WORDS, len(words))
    ids = np.fromiter(map(_hash_word, words), dtype=np.uint64, count=len(words))
    runs = len(words) - length + 1
    found = np.zeros(runs, dtype=np.uint64)
    for offset in range(length):  # Horner's rule modulo 2^64
        found = found * _BASE + ids[offset : offset + runs]
    return _mix(found)


def _simplify(text: str) -> str:
    """Make lower case and remove accents, as some tokenizers do."""
    if not text.isascii():
        decomposed = unicodedata.normalize("NFKD", text)
        text = "".join(c for c in decomposed if not unicodedata.combining(c))
    return text.lower()


@lru_cache(maxsize=200_000)
def _hash_word(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _mix(values: Hashes) -> Hashes:
    """Apply the finalizer of splitmix64 (Steele et al. 2014): every bit depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def winnow(hashes: Hashes) -> Hashes:
    """Keep the smallest of every WINDOW hashes in a row (of all, if they are fewer), each once."""
    if len(hashes) <= WINDOW:
        return hashes.min(keepdims=True) if len(hashes) else hashes
    windows = np.lib.stride_tricks.sliding_window_view(hashes, WINDOW)
    return np.unique(windows.min(1))


def build_sketch(rows: Iterable[str]) -> Hashes:
    """Build the sorted hashes that represent the rows of a text, at most MOST."""
    kept = [winnow(hash_row(row)) for row in rows]
    return np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *kept]))[:MOST]


def encode_sketch(hashes: Hashes) -> str:
    """Encode as text for JSON: base64 of little-endian 64-bit numbers."""
    return base64.b64encode(hashes.astype("<u8").tobytes()).decode()


def decode_sketch(text: str) -> Hashes:
    """Decode the text of `encode_sketch`.

    Raises:
        DataError: it is not such a text.
    """
    try:
        raw = base64.b64decode(text, validate=True)
        return np.frombuffer(raw, dtype="<u8").astype(np.uint64)
    except ValueError as error:
        raise DataError(f"the fingerprints of the calibration text are damaged: {error}") from error


def measure_overlap(known: Hashes, rows: Sequence[str]) -> Overlap:
    """Measure what the rows of an evaluated text share with the sketch of a calibration."""
    hashes = [hash_row(row) for row in rows]
    every = np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *hashes]))
    own = np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *map(winnow, hashes)]))
    found = int(np.isin(known, every).sum())
    theirs = int(np.isin(own, known).sum())
    shares = (found / max(len(known), 1), theirs / max(len(own), 1))
    return Overlap(found=found, kept=len(known), share=max(shares))

"""Compress a model to the size of a uniform 4-bit model.

    python examples/compress_a_model.py [MODEL] [OUT]

MODEL is a Hub id or the directory of a dense checkpoint. The small `samples` and `seqlen` make this
an example of a minute; leave them out for a model that you want to keep.
"""

import sys

import cptq
from cptq.types import Event, Progress

MODEL, OUT = (*sys.argv[1:], *("HuggingFaceTB/SmolLM2-135M", "example-4bit")[len(sys.argv) - 1 :])


def show(event: Event) -> None:
    """Print the stages as they begin, and every notice."""
    if not isinstance(event, Progress):
        print(f"{event.kind}: {event.subject}: {event.message}")
    elif event.done == 0:
        print(f"{event.stage} ({event.total} steps)")


result = cptq.compress(
    MODEL, target="4bit", out=OUT, samples=16, seqlen=128, overwrite=True, progress=show
)
size = result.summary.size
assert size is not None
assert result.artifact is not None
print(f"{size.dense_file_bytes:,} bytes became {size.file_bytes:,} in {result.artifact.path}")
print(f"{size.effective_bits:.2f} bits a weight, report: {result.reports['html']}")

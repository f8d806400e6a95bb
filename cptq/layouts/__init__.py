"""File layouts: which tensors a layer becomes on disk, and in how many bytes. No torch.

One file per format, and what they share: the safetensors header and the choice of a group size. A
budget is counted with the same values that a writer writes, so the two cannot differ.
"""

from cptq.layouts.interface import Layout

__all__ = ["Layout"]

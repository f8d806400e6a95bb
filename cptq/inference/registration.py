"""Register the quantization method `cptq` with transformers on `import cptq`.

transformers has no entry points for quantizers: `register_quantizer` must be called in each
process. Calling it imports transformers and torch, which takes seconds that `cptq --help` must not
spend. If `transformers.quantizers.auto` is already imported, the method is registered at once.
Otherwise a finder at the head of `sys.meta_path` waits for that module, lets the usual finders load
it, registers the method and removes itself (as `wrapt.when_imported` does).

Limit: the registration holds for one process; a worker must import cptq itself.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

#: the module with transformers' tables of quantization methods
TABLE = "transformers.quantizers.auto"


def ensure_registered() -> None:
    """Register now, or when transformers imports its quantizers. Safe to call again."""
    table = sys.modules.get(TABLE)
    if table is not None and hasattr(table, "register_quantizer"):
        _register()
    elif not any(isinstance(finder, _ImportWatcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ImportWatcher())


def _register() -> None:
    # imported only now, because it imports torch
    import_module("cptq.inference.quantizer").register()


class _ImportWatcher:
    """A finder that finds nothing itself, but notices the import of the table of methods."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)  # type: ignore[assignment]
        return spec


class _RegisteringLoader:
    """A loader that runs the usual loader and then registers the method."""

    def __init__(self, usual: Loader) -> None:
        self._usual = usual

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._usual.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._usual
        module.__loader__ = self._usual
        self._usual.exec_module(module)
        _register()

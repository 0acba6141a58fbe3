"""Spense checkpoints in ``transformers``: ``import vllm_spense``, then ``from_pretrained`` as ever.

transformers reads a registry of quantisation methods. :func:`announce` puts Spense into it, at once where the
registry has been imported, else right after it is: transformers takes seconds to import, and neither the
commands nor the vLLM plugin shall wait for it.
"""

from __future__ import annotations

import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


def announce() -> None:
    """Register the loader with transformers, now or when transformers is imported. Imports nothing itself."""
    registry = sys.modules.get(_REGISTRY)
    if registry is not None and hasattr(registry, "AUTO_QUANTIZER_MAPPING"):
        _register()
    elif not any(isinstance(finder, _AfterRegistry) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterRegistry())


class _AfterRegistry(MetaPathFinder):
    """Finds one module, where everybody else finds it, and registers the loader once that has run."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    try:
        from vllm_spense.hf.quantizer import register

        register()
    except Exception as error:  # a transformers that we do not know must still be importable
        version = getattr(sys.modules.get("transformers"), "__version__", "of unknown version")
        warnings.warn(
            f"vllm-spense has no loader for transformers {version} ({error}); use what `spense export` makes",
            stacklevel=2,
        )

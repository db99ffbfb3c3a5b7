"""Retrieval-augmented generation in JAX and Flax.

The names in `__all__` are stable: a change to one is announced in CHANGELOG.md. Everything else may change between
versions.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> its module, imported when the name is first used, so that `import rag_jax` and the commands start fast
_PUBLIC = {
    "fit": "rag_jax.training.from_python",
    "Texts": "rag_jax.training.from_python",
    "from_pretrained": "rag_jax.pretrained.load",
    "save_pretrained": "rag_jax.pretrained.export",
    "Pipeline": "rag_jax.inference.pipeline",
}


__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])

"""A4A: carry an IP-Adapter to a model of another architecture (A4A).

Importing this package costs nothing; its names load torch and diffusers on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .methods import A4A as A4A
from .methods import A4A_KIND as A4A_KIND
from .methods import IP_ADAPTER as IP_ADAPTER
from .methods import TrainA4A as TrainA4A

if TYPE_CHECKING:
    from .bank import Bank as Bank
    from .model import A4AModel as A4AModel
    from .source import IPAdapterSource as IPAdapterSource
    from .targets import AttentionLayer as AttentionLayer
    from .targets import find_attention_layers as find_attention_layers

_LAZY = {
    "A4AModel": "model",
    "AttentionLayer": "targets",
    "Bank": "bank",
    "IPAdapterSource": "source",
    "find_attention_layers": "targets",
}

__all__ = ["A4A", "A4A_KIND", "IP_ADAPTER", "TrainA4A", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

"""LoRA-X as something to train: a small matrix between the base's own leading singular vectors (arXiv 2501.16559).

Importing this package costs nothing; its names load PEFT and torch on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .methods import LORAX as LORAX

if TYPE_CHECKING:
    from .config import LoraXConfig as LoraXConfig

_LAZY = {"LoraXConfig": "config"}

__all__ = ["LORAX", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import_module(f"{__name__}.tuner")  # from here on, PEFT knows the format
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

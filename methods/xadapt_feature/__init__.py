"""Input, output, hybrid and full adaptation: any PEFT method in feature space (Revisit Model Adaptation from Parameters to Features), as PEFT tuners.

Importing this package costs nothing; its names load PEFT and torch on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .methods import FULL_ADA as FULL_ADA
from .methods import HYBRID_ADA as HYBRID_ADA
from .methods import INPUT_ADA as INPUT_ADA
from .methods import OUTPUT_ADA as OUTPUT_ADA

if TYPE_CHECKING:
    from .any_method import feature_space as feature_space
    from .config import InputAdaConfig as InputAdaConfig
    from .config import OutputAdaConfig as OutputAdaConfig
    from .full import FullAdaConfig as FullAdaConfig
    from .hybrid import HybridAdaConfig as HybridAdaConfig
    from .layer import FeatureLayer as FeatureLayer

_LAZY = {
    "InputAdaConfig": "config",
    "OutputAdaConfig": "config",
    "HybridAdaConfig": "hybrid",
    "FullAdaConfig": "full",
    "FeatureLayer": "layer",
    "feature_space": "any_method",
}

__all__ = ["FULL_ADA", "HYBRID_ADA", "INPUT_ADA", "OUTPUT_ADA", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import_module(f"{__name__}.register")  # from here on, PEFT knows the formats
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

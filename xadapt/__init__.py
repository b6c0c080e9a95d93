"""Train an adapter once, in feature space. Carry it to every sibling of the model. Check before you trust it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from xadapt.version import __version__ as __version__

if TYPE_CHECKING:  # what type checkers and IDEs see; at run time the names below resolve on first use
    from xadapt.base import open_base as open_base
    from xadapt.checking.check import check as check
    from xadapt.export import export_lora as export_lora
    from xadapt.inspection import inspect as inspect
    from xadapt.merging import merge as merge
    from xadapt.merging import plan_merge as plan_merge
    from xadapt.reading import detach as detach
    from xadapt.reading import read_adapter as read_adapter
    from xadapt.saving import save as save
    from xadapt.store import load as load
    from xadapt.transferring.transfer import plan_transfer as plan_transfer
    from xadapt.transferring.transfer import transfer as transfer
    from xadapt.transferring.transfer import transfer_all as transfer_all
    from xadapt.verifying.verify import verify as verify
    from xadapt_a4a import A4AModel as A4AModel
    from xadapt_feature import FullAdaConfig as FullAdaConfig
    from xadapt_feature import HybridAdaConfig as HybridAdaConfig
    from xadapt_feature import InputAdaConfig as InputAdaConfig
    from xadapt_feature import OutputAdaConfig as OutputAdaConfig
    from xadapt_feature import feature_space as feature_space

_LAZY = {  # `import peft` takes seconds, and `xadapt --help` must not
    "A4AModel": "xadapt_a4a",
    "FullAdaConfig": "xadapt_feature",
    "HybridAdaConfig": "xadapt_feature",
    "InputAdaConfig": "xadapt_feature",
    "OutputAdaConfig": "xadapt_feature",
    "check": "xadapt.checking.check",
    "detach": "xadapt.reading",
    "export_lora": "xadapt.export",
    "feature_space": "xadapt_feature",
    "inspect": "xadapt.inspection",
    "load": "xadapt.store",
    "merge": "xadapt.merging",
    "open_base": "xadapt.base",
    "plan_merge": "xadapt.merging",
    "plan_transfer": "xadapt.transferring.transfer",
    "read_adapter": "xadapt.reading",
    "save": "xadapt.saving",
    "transfer": "xadapt.transferring.transfer",
    "transfer_all": "xadapt.transferring.transfer",
    "verify": "xadapt.verifying.verify",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

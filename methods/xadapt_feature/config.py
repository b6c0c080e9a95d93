"""The configs: PEFT's own, with a space. Every option of the PEFT config keeps its name and meaning."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar, cast

from peft import LoraConfig

from xadapt.peft_internals import PeftType
from xadapt.version import __version__

from .refusals import check_options


def rank_error(name: str, rank: object) -> ValueError:
    """What to say about a rank that is none."""
    return ValueError(f"{name}={rank!r}: a rank is a positive integer, for example {name}=8.")


@dataclass
class FeatureConfig:
    """What every config in feature space shares. Stands before a PEFT config class."""

    xadapt_version: str | None = field(
        default=None, metadata={"help": "The xadapt version that wrote this; leave empty to fill in."}
    )

    type_name: ClassVar[str]  # the PEFT type
    low_rank: ClassVar[bool] = False  # r is the rank of the update, so r above the layer's width is a mistake

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Late, since it imports this module; here, since unpickling in a fresh process comes by as well.
        import_module("xadapt_feature.register")
        known = [f.name for f in dataclasses.fields(cls) if f.init]
        for name in kwargs:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}."
                # PEFT recognises a config of a newer version by the first half of this sentence.
                raise TypeError(f"{cls.__name__}.__init__() got an unexpected keyword argument {name!r}; {hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.low_rank:
            self._check_ranks()
        check_options(self)  # before PEFT asks for whatever else a refused option needs
        super().__post_init__()  # type: ignore[misc]  # the PEFT config's
        cast(Any, self).peft_type = PeftType(self.type_name)
        if self.xadapt_version is None:
            self.xadapt_version = __version__

    def _check_ranks(self) -> None:
        ranks = {"r": getattr(self, "r", 1)}
        for pattern, rank in (getattr(self, "rank_pattern", None) or {}).items():
            ranks[f"rank_pattern[{pattern!r}]"] = rank
        for name, rank in ranks.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise rank_error(name, rank)


@dataclass
class InputConfig(FeatureConfig):
    """Y = X Φ W (paper 002, Eq. 4b)."""

    tie: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "Regular expression(s) searched in a layer's path. Layers that match with equal captured groups "
            "share one adapter, stored once. For layers that read the same features, as cross-attention k and v."
        },
    )
    space: ClassVar[str] = "input"

    def __post_init__(self) -> None:
        super().__post_init__()
        for pattern in [self.tie] if isinstance(self.tie, str) else self.tie or []:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"tie={pattern!r} is no regular expression ({error}); it could be r'attn2\\.to_[kv]$'."
                ) from None


@dataclass
class OutputConfig(FeatureConfig):
    """Y = X W Φ (paper 002, Eq. 4c)."""

    space: ClassVar[str] = "output"


@dataclass
class InputAdaConfig(InputConfig, LoraConfig):
    """Input adaptation, y = W(x + s·BAx) + b: a LoRA of the layer's input features (paper 002, Eq. 2).

    Takes every option of `LoraConfig` with its name and meaning, and `tie`. A is (r, in_features), B is
    (in_features, r), s is lora_alpha/r, or lora_alpha/√r with use_rslora.

    Example:
        >>> model = get_peft_model(model, InputAdaConfig(r=8, target_modules=["q_proj", "v_proj"]))

    Raises:
        TypeError: an option that does not exist.
        ValueError: an option that means nothing on an identity layer (`init_lora_weights="pissa"` ...).
    """

    type_name: ClassVar[str] = "INPUT_ADA"
    low_rank: ClassVar[bool] = True


@dataclass
class OutputAdaConfig(OutputConfig, LoraConfig):
    """Output adaptation, y = Φ(Wx + b) with Φ = I + s·BA: a LoRA of the layer's output features (paper 002, Eq. 2).

    Takes every option of `LoraConfig` with its name and meaning. A is (r, out_features), B is (out_features, r).
    Φ moves the bias too.

    Example:
        >>> model = get_peft_model(model, OutputAdaConfig(r=8, target_modules=["q_proj", "v_proj"]))

    Raises: as `InputAdaConfig`.
    """

    type_name: ClassVar[str] = "OUTPUT_ADA"
    low_rank: ClassVar[bool] = True

"""The configs: PEFT's own, with a space. Every option of the PEFT config keeps its name and meaning."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar, cast

from peft import LoraConfig, PeftConfig

from xadapt.errors import did_you_mean
from xadapt.peft_internals import PeftType
from xadapt.version import __version__

from .refusals import check_options

# What people call options of PEFT's that have another name there.
COMMON_NAMES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}


def rank_error(name: str, rank: object) -> ValueError:
    """What to say about a rank that is none."""
    return ValueError(f"{name}={rank!r}: a rank is a positive integer, for example {name}=8.")


@dataclass
class FeatureConfig:
    """What every config in feature space shares. Stands before a PEFT config class."""

    xadapt_version: str | None = field(
        default=None, metadata={"help": "The xadapt version that wrote this; leave empty to fill in."}
    )
    base_fingerprint: dict[str, str] | None = field(
        default=None,
        metadata={"help": "What the adapted layers of the base looked like; filled in when it is attached."},
    )

    type_name: ClassVar[str]  # the PEFT type
    ranks: ClassVar[tuple[str, ...]] = ()  # the options that are ranks: none is 0, or above the layer's width
    low_rank: ClassVar[bool] = False  # whether that is the update's rank: above the features adapted, it adds nothing

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Late, since it imports this module; here, since unpickling in a fresh process comes by as well.
        import_module("xadapt_feature.register")
        for name in kwargs:
            if name not in {f.name for f in dataclasses.fields(cls) if f.init}:
                # PEFT recognises a config of a newer version by the first half of this sentence.
                raise TypeError(
                    f"{cls.__name__}.__init__() got an unexpected keyword argument {name!r}; {cls._instead_of(name)}"
                )
        return super().__new__(cls)

    @classmethod
    def _instead_of(cls, name: str) -> str:
        """What to write in the place of an option that does not exist."""
        options = [f.name for f in dataclasses.fields(cls) if f.init]
        common = {f.name for f in dataclasses.fields(PeftConfig)}
        known = sorted(options, key=common.__contains__)  # what is the method's own comes first
        side = getattr(cls, "space", None)
        if name == "space" and isinstance(side, str):
            other = {"input": "output", "output": "input"}[side]
            return (
                f"{cls.__name__} is for {side} space. For {other} space use {other.capitalize()}AdaConfig, or "
                f"feature_space(config, {other!r})."
            )
        if name == "tie":
            return "tie is for input space only, where layers can read the same features: InputAdaConfig has it."
        if COMMON_NAMES.get(name) in known:
            return f"Did you mean {COMMON_NAMES[name]!r}?"
        return did_you_mean(name, known, limit=8)

    def __post_init__(self) -> None:
        self._check_ranks()
        check_options(self)  # before PEFT asks for whatever else a refused option needs
        super().__post_init__()  # type: ignore[misc]  # the PEFT config's
        cast(Any, self).peft_type = PeftType(self.type_name)
        # A config from a file keeps the fingerprint of the base it was trained on, wherever it is attached.
        self.is_new = self.xadapt_version is None
        if self.xadapt_version is None:
            self.xadapt_version = __version__

    def _check_ranks(self) -> None:
        ranks = {name: getattr(self, name) for name in self.ranks}
        patterns = getattr(self, "rank_pattern", None) if ranks else None
        for pattern, rank in (patterns or {}).items():
            if isinstance(rank, list):  # AdaLoRA's: which of the ranks are kept
                continue
            ranks[f"rank_pattern[{pattern!r}]"] = rank
        for name, rank in ranks.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise rank_error(name, rank)


@dataclass
class InputConfig(FeatureConfig):
    """Y = X Φ W (Revisit Model Adaptation, Eq. 4b)."""

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
        if self.tie is not None:
            for pattern in self.tie if isinstance(self.tie, (list, tuple)) else [self.tie]:
                _check_pattern(pattern)


def _check_pattern(pattern: object) -> None:
    example = r"it could be r'attn2\.to_[kv]$'"
    if not isinstance(pattern, str):
        raise TypeError(f"tie takes a regular expression or a list of them, got {pattern!r}; {example}.")
    if not pattern:
        raise ValueError(f"tie={pattern!r} matches every layer; say which ones read the same features, {example}.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"tie={pattern!r} is no regular expression ({error}); {example}.") from None


@dataclass
class OutputConfig(FeatureConfig):
    """Y = X W Φ (Revisit Model Adaptation, Eq. 4c)."""

    space: ClassVar[str] = "output"


@dataclass
class InputAdaConfig(InputConfig, LoraConfig):
    """Input adaptation, y = W(x + s·BAx) + b: a LoRA of the layer's input features (Revisit Model Adaptation, Eq. 2).

    Takes every option of `LoraConfig` with its name and meaning, and `tie`. A is (r, in_features), B is
    (in_features, r), s is lora_alpha/r, or lora_alpha/√r with use_rslora.

    Example:
        >>> model = get_peft_model(model, InputAdaConfig(r=8, target_modules=["q_proj", "v_proj"]))

    Raises:
        TypeError: an option that does not exist.
        ValueError: an option that means nothing on an identity layer (`init_lora_weights="pissa"` ...).
    """

    type_name: ClassVar[str] = "INPUT_ADA"
    ranks: ClassVar[tuple[str, ...]] = ("r",)
    low_rank: ClassVar[bool] = True


@dataclass
class OutputAdaConfig(OutputConfig, LoraConfig):
    """Output adaptation, y = Φ(Wx + b) with Φ = I + s·BA: a LoRA of the layer's output features (Revisit Model Adaptation, Eq. 2).

    Takes every option of `LoraConfig` with its name and meaning. A is (r, out_features), B is (out_features, r).
    Φ moves the bias too.

    Example:
        >>> model = get_peft_model(model, OutputAdaConfig(r=8, target_modules=["q_proj", "v_proj"]))

    Raises: as `InputAdaConfig`.
    """

    type_name: ClassVar[str] = "OUTPUT_ADA"
    ranks: ClassVar[tuple[str, ...]] = ("r",)
    low_rank: ClassVar[bool] = True

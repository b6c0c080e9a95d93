"""What this package registers: adapters learnt on the target from the source's adapter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from xadapt.contract import Adapter, Siblings, Transfer
from xadapt.kinds import PeftKind
from xadapt_feature import FULL_ADA
from xadapt_weight.spaces import LOW_RANK, WRITES, Space, in_each_space

PAPER = "Distilling the change of behaviour; for LoRAs, Trans-LoRA: https://arxiv.org/abs/2405.17258"


@dataclass(frozen=True, kw_only=True)
class Distil:
    """Trains a LoRA on the target until it changes the target's behaviour as the source's adapter changes the source's."""

    rank: int = 8
    alpha: float | None = None
    """The rank, if none is given."""

    targets: str = ""
    """Layers to adapt: a name, several with commas, a regular expression, or "all-linear". By default the counterparts of those
    that the source's adapter is on."""

    steps: int = 500
    gradient_accumulation_steps: int = 1
    """Batches that a step is made of: as many samples at once as memory takes, and as many in a step as learning wants."""

    lr: float = 1e-3
    weight_decay: float = 0.0
    clip: float = 1.0
    """Gradients above this norm are shortened to it."""

    temperature: float = 1.0
    """Of language models: above 1, unlikely tokens count for more."""

    seed: int = 0
    checkpoint: str = ""
    """A folder. With it, an interrupted run goes on where it was last saved, and ends in the same adapter."""

    save_every: int = 100
    """Steps between two of those."""

    space: ClassVar[Space] = "parameter"

    def __post_init__(self) -> None:
        for name, least in (
            ("rank", 1),
            ("steps", 1),
            ("gradient_accumulation_steps", 1),
            ("save_every", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{name}={value!r}: an integer from {least} on, for example {name}={Distil.__dict__[name]}."
                )
        for name in ("lr", "clip", "temperature", *(["alpha"] if self.alpha is not None else [])):
            if not _is_number(value := getattr(self, name)) or value <= 0:
                raise ValueError(
                    f"{name}={value!r}: a number above 0, for example {name}={Distil.__dict__[name] or 8}."
                )
        if not _is_number(self.weight_decay) or self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay!r}: a number from 0 on.")

    @property
    def kind(self) -> PeftKind:
        """What is trained and written."""
        return WRITES[self.space]

    def fit(self, adapter: Adapter, bases: Siblings, batches: Iterable[Any]) -> Transfer:
        """The trained transfer, for this adapter and this target.

        Args:
            batches: dicts of arguments for the forward of both bases. What labels of -100 leave out is not learnt from. Read
                again from the start when they end, so no iterator that can be read only once, unless it is long enough.

        Raises:
            TypeError, ValueError: no batches, of the wrong sort, or for bases with other vocabularies; the outputs are no
                logits or predicted noise; the loss is not finite; the checkpoint is of another run.
        """
        from .fitting import fit

        return fit(self, adapter, bases, batches)


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < float("inf")


@dataclass(frozen=True, kw_only=True)
class DistilInput(Distil):
    """The same, with an input adapter."""

    space = "input"


@dataclass(frozen=True, kw_only=True)
class DistilOutput(Distil):
    """The same, with an output adapter."""

    space = "output"


_SUMMARY = "a fresh {}, trained on unlabelled inputs to change the target as the adapter changed the source"

DISTIL, DISTIL_INPUT, DISTIL_OUTPUT = in_each_space(
    "distil",
    {
        "parameter": _SUMMARY.format("LoRA"),
        "input": _SUMMARY.format("input adapter"),
        "output": _SUMMARY.format("output adapter"),
    },
    {"parameter": Distil, "input": DistilInput, "output": DistilOutput},
    PAPER,
    reads=(*LOW_RANK, FULL_ADA.writes),
)

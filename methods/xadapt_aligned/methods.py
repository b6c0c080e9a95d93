"""What this package registers: existing adapters carried along the maps between two bases' features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from xadapt.contract import Adapter, Siblings, Transfer
from xadapt.kinds import PeftKind
from xadapt_weight.spaces import WRITES, Space, in_each_space

CHOICES = ("choose", "identity", "permutation", "procrustes", "least_squares", "near_identity")
PRECISIONS = ("float32", "float64")
PAPER = "Revisit Model Adaptation from Parameters to Features (Eq. 5, on data); Procrustes: Schönemann 1966; permutations: arXiv 2209.04836"


@dataclass(frozen=True, kw_only=True)
class Aligned:
    """Learns linear maps between the two bases' features, layer by layer, from unlabelled inputs. No gradients.

    `evidence` has for each layer how much of the features its maps leave unexplained ("inputs", "outputs"), which maps these are,
    and, where the update was re-expressed in another space, what of its effect on the data was lost ("error").
    """

    map: str = "choose"
    """"identity", "permutation", "procrustes", "least_squares", "near_identity", or "choose": per feature space the one that changes
    least and still explains the data. With "identity" the adapter is only re-expressed in the other space, on the data."""

    stay: float = 1.0
    """Of "choose": features nearer to the source's than this, relative to their size, are taken to have kept their basis."""

    ridge: float = 1e-6
    """As a share of the mean feature's energy. It says how much the data has to show of a direction before it counts."""

    probe: float = 1e-3
    """How much of what the two weights do to inputs that the data lacks counts beside the data, when outputs are mapped: an
    update may write where no output of the source lies. As a share of the mean input's energy; 0 for the data alone."""

    precision: str = "float64"
    """To sum up and calculate in: "float64", or "float32" at half the memory."""

    space: ClassVar[Space] = "parameter"

    def __post_init__(self) -> None:
        if self.map not in CHOICES:
            raise ValueError(f"map={self.map!r} is no map of features; write one of {', '.join(map(repr, CHOICES))}.")
        for name in ("stay", "ridge", "probe"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(
                    f"{name}={value!r}: a number from 0 on, for example {name}={type(self)().__dict__[name]}."
                )
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: write precision='float32' or precision='float64'.")

    @property
    def kind(self) -> PeftKind:
        """What is written."""
        return WRITES[self.space]

    def fit(self, adapter: Adapter, bases: Siblings, batches: Iterable[Any]) -> Transfer:
        """The transfer for adapters on the layers of this one. One pass over the batches, through both networks.

        Args:
            batches: dicts of arguments for the forward of both bases; the same inputs go through both.

        Raises:
            TypeError, ValueError: the batches are empty, too few for the features' width, no dicts, or the two bases do not
                see the same positions of them; a layer's features are not finite.
        """
        from .fitting import fit

        return fit(self, adapter, bases, batches, self.kind)


@dataclass(frozen=True, kw_only=True)
class AlignedInput(Aligned):
    """Writes input adapters."""

    space = "input"


@dataclass(frozen=True, kw_only=True)
class AlignedOutput(Aligned):
    """Writes output adapters."""

    space = "output"


ALIGNED, ALIGNED_INPUT, ALIGNED_OUTPUT = in_each_space(
    "aligned",
    {
        "parameter": "the update carried along learnt maps of both feature spaces, as a LoRA: other widths and depths too",
        "input": "an input adapter, or what the data shows of a LoRA as one, carried along a learnt map of the inputs",
        "output": "an output adapter, or what the data shows of a LoRA as one, carried along a learnt map of the outputs",
    },
    {"parameter": Aligned, "input": AlignedInput, "output": AlignedOutput},
    PAPER,
)

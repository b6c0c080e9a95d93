"""The methods that carry an existing adapter by the bases' weights alone: options, what is read and written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

from xadapt.contract import Adapter, Carried, Kind, Method, Siblings
from xadapt.kinds import PeftKind
from xadapt_feature import HYBRID_ADA, INPUT_ADA, OUTPUT_ADA

from .methods import LORA
from .spaces import LOW_RANK

if TYPE_CHECKING:
    from xadapt.truncate import Truncation

PRECISIONS = ("float32", "float64")


@dataclass(frozen=True, kw_only=True)
class PseudoInverse:
    """The update re-expressed on the source's weights as an adapter in feature space (Revisit Model Adaptation, Eq. 5).

    `evidence` has what each layer's adapter misses of the update on the source.
    """

    ridge: float = 0.01
    """As a share of the weight's mean squared singular value. The plain pseudo-inverse, 0, fits the source exactly where it
    can, by numbers so large that no other base can take them; a ridge keeps them small."""

    precision: str = "float64"
    """To calculate in: "float64", or "float32" at half the memory."""

    space: ClassVar[str]
    kind: ClassVar[Kind]

    def __post_init__(self) -> None:
        if (
            isinstance(self.ridge, bool)
            or not isinstance(self.ridge, int | float)
            or not 0 <= self.ridge < float("inf")
        ):
            raise ValueError(f"ridge={self.ridge!r}: a number from 0 on, for example ridge=0.01.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: write precision='float32' or precision='float64'.")
        if self.ridge == 0 and self.precision == "float32":
            raise ValueError(
                "ridge=0 in float32 would be rounding: the singular values are squared on the way. Use precision='float64', or "
                "a ridge, for example ridge=0.01."
            )

    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        """The adapter in feature space, on the layers of the target. Reads the adapted layers of the source, one at a time."""
        import torch

        from .conversion import Solve, to_feature_space

        dtype = getattr(torch, self.precision)
        solve = Solve(self.space, self.ridge, dtype, getattr(self, "hold_bias", False))
        return to_feature_space(adapter, bases, cast(PeftKind, self.kind), solve)


@dataclass(frozen=True, kw_only=True)
class PseudoInverseInput(PseudoInverse):
    """ΔW = W Δ, and the target's weight in the place of W."""

    space = "input"
    kind = INPUT_ADA.writes


@dataclass(frozen=True, kw_only=True)
class PseudoInverseOutput(PseudoInverse):
    """ΔW = Δ W, and the target's weight in the place of W."""

    hold_bias: bool = True
    """Undo by a constant (lora_bias) what an output adapter does to the layer's bias, which a LoRA leaves alone."""

    space = "output"
    kind = OUTPUT_ADA.writes


@dataclass(frozen=True, kw_only=True)
class _Subspace:
    rank: int | None = None
    """How many singular directions span a weight's subspaces."""

    energy: float | None = None
    """Or as many as hold this share of the weight's squared norm. 0.99 if neither is given."""

    def __post_init__(self) -> None:
        from xadapt.truncate import Truncation

        Truncation(self.rank, self.energy)  # which says what is wrong


@dataclass(frozen=True, kw_only=True)
class LoraX(_Subspace):
    """The update, as far as it lies in the leading singular subspaces of the target's weights.

    `evidence` has what each layer loses by the projection.
    """

    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        """A plain LoRA for the target. Reads the adapted layers of both, one pair at a time."""
        from .conversion import to_target_subspaces

        return to_target_subspaces(adapter, bases, LORA, _truncation(self))


@dataclass(frozen=True, kw_only=True)
class ProLora(_Subspace):
    """The update's part inside the source's leading singular subspaces, and its part outside, each taken to the target's.

    `evidence` has how far each layer's update moved.
    """

    cross_terms: bool = False
    """Carry what is inside on one side and outside on the other as well; the paper leaves it out."""

    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        """A plain LoRA for the target. Reads the adapted layers of both, one pair at a time."""
        from .conversion import to_both_parts

        return to_both_parts(adapter, bases, LORA, _truncation(self), self.cross_terms)


def _truncation(options: _Subspace) -> Truncation:
    from xadapt.truncate import Truncation

    asked = options.rank is not None or options.energy is not None
    return Truncation(options.rank, options.energy if asked else 0.99)


PINV_INPUT = Method(
    name="pinv_input",
    summary="an existing LoRA re-expressed on its base as an input adapter, by a ridge pseudo-inverse",
    paper="Revisit Model Adaptation from Parameters to Features, Eq. 5",
    reads=(LORA, OUTPUT_ADA.writes, HYBRID_ADA.writes),
    writes=INPUT_ADA.writes,
    build=PseudoInverseInput,
)
PINV_OUTPUT = Method(
    name="pinv_output",
    summary="an existing LoRA re-expressed on its base as an output adapter, by a ridge pseudo-inverse",
    paper="Revisit Model Adaptation from Parameters to Features, Eq. 5",
    reads=(LORA, INPUT_ADA.writes, HYBRID_ADA.writes),
    writes=OUTPUT_ADA.writes,
    build=PseudoInverseOutput,
)
LORA_X = Method(
    name="lora_x",
    summary="the update projected on the target weights' leading singular subspaces, as a LoRA",
    paper="LoRA-X, https://arxiv.org/abs/2501.16559",
    reads=LOW_RANK,
    writes=LORA,
    build=LoraX,
)
PROLORA = Method(
    name="prolora",
    summary="the update's parts inside and outside the source's singular subspaces, each taken to the target's, as a LoRA",
    paper="ProLoRA, https://arxiv.org/abs/2506.04244",
    reads=LOW_RANK,
    writes=LORA,
    build=ProLora,
)

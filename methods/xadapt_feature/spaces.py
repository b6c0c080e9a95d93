"""The two feature spaces: on which side of the base layer Φ stands (Revisit Model Adaptation, Eq. 2-4)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from xadapt.matrix import Dense, LowRank, Matrix, times
from xadapt.update import Update, calculating_in

from .phi import Phi


class Space(ABC):
    """Where an adapter acts. Weights have the layout (out, in, *kernel)."""

    name: str
    feature: str  # how messages call the features Φ acts on

    @abstractmethod
    def width(self, in_features: int, out_features: int) -> int:
        """Width of the features that Φ acts on."""

    @abstractmethod
    def forward(self, base: Callable[[Tensor], Tensor], phi: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The adapted layer's output."""

    @abstractmethod
    def fold(self, weight: Tensor, delta: Matrix) -> Matrix:
        """What Φ adds to the weight, as (out, in·kernel). Of low rank where Δ is: of the same one, kernels aside."""

    @abstractmethod
    def fold_bias(self, weight: Tensor, bias: Tensor | None, phi: Phi) -> Tensor | None:
        """What Φ adds to the bias, or None where it adds nothing."""

    def update(self, weight: Tensor, bias: Tensor | None, phi: Phi) -> Update:
        """What Φ adds to a layer of weight (out, in, *kernel). Tensors of Φ have the dtype to calculate in."""
        bias = None if bias is None else bias.to(calculating_in(weight))
        return Update(self.fold(weight, phi.delta), self.fold_bias(weight, bias, phi))


class InputSpace(Space):
    """y = W Φ(x) + b, hence W ← WΦ and b ← b + Wc."""

    name = "input"
    feature = "input"

    def width(self, in_features: int, out_features: int) -> int:
        return in_features

    def forward(self, base: Callable[[Tensor], Tensor], phi: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        features = phi(x)
        y = base(features)
        if features.requires_grad and not y.requires_grad:
            raise ValueError(
                "This base layer passes no gradient back to its input (quantised with dynamic activations, for example), "
                "so no input adaptation before it can learn. Quantise the weights only, or use OutputAdaConfig."
            )
        return y

    def fold(self, weight: Tensor, delta: Matrix) -> Matrix:
        if weight.ndim == 2:
            return delta.after(weight)
        rows = delta.after(weight.movedim(1, -1).reshape(-1, weight.shape[1]))  # (out·kernel, in)
        return _beside_kernel(rows, weight.shape[0], weight[0, 0].numel())

    def fold_bias(self, weight: Tensor, bias: Tensor | None, phi: Phi) -> Tensor | None:
        if phi.offset is None:
            return None
        # A constant added before a convolution meets the kernel at every position, padding aside: see BaseLayer.
        return times(weight.flatten(2).sum(-1) if weight.ndim > 2 else weight, phi.offset[:, None])[:, 0]


class OutputSpace(Space):
    """y = Φ(W x + b), hence W ← ΦW and b ← Φb."""

    name = "output"
    feature = "output"

    def width(self, in_features: int, out_features: int) -> int:
        return out_features

    def forward(self, base: Callable[[Tensor], Tensor], phi: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return phi(base(x))

    def fold(self, weight: Tensor, delta: Matrix) -> Matrix:
        return delta.before(weight.flatten(1))

    def fold_bias(self, weight: Tensor, bias: Tensor | None, phi: Phi) -> Tensor | None:
        moved = None if bias is None else phi.delta.before(bias[:, None]).tensor()[:, 0]
        if phi.offset is None or moved is None:
            return phi.offset if moved is None else moved
        return moved + phi.offset


def _beside_kernel(rows: Matrix, out: int, positions: int) -> Matrix:
    """From (out·kernel, in) to (out, in·kernel). A rank r becomes r·kernel: each position has products of its own."""
    if isinstance(rows, Dense):
        return Dense(rows.matrix.view(out, positions, -1).transpose(1, 2).reshape(out, -1))
    if positions == 1:
        return rows
    rank, width = rows.right.shape
    right = rows.right.new_zeros(positions, rank, width, positions)
    for position in range(positions):
        right[position, :, :, position] = rows.right
    return LowRank(rows.left.view(out, positions * rank), right.view(positions * rank, width * positions))


SPACES: dict[str, Space] = {space.name: space for space in (InputSpace(), OutputSpace())}


def get_space(name: str) -> Space:
    """The space of that name; ValueError names the two there are."""
    if name not in SPACES:
        raise ValueError(f"space={name!r} is not a feature space; write space='input' or space='output'.")
    return SPACES[name]

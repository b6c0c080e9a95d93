"""The two feature spaces: on which side of the base layer Φ stands (paper 002, Eq. 2-4)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from .phi import Matrix, Phi


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
    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as a matrix whose columns (input) or rows (output) are the features Φ acts on."""

    @abstractmethod
    def weight(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Inverse of `matrix`."""

    @abstractmethod
    def fold(self, matrix: Tensor, delta: Matrix) -> Matrix:
        """What Φ adds to the weight, in the layout of `matrix`."""

    @abstractmethod
    def fold_bias(self, weight: Tensor, bias: Tensor | None, phi: Phi) -> Tensor | None:
        """What Φ adds to the bias, or None where it adds nothing."""


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

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.movedim(1, -1).reshape(-1, weight.shape[1])

    def weight(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        return matrix.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)

    def fold(self, matrix: Tensor, delta: Matrix) -> Matrix:
        return delta.after(matrix)

    def fold_bias(self, weight: Tensor, bias: Tensor | None, phi: Phi) -> Tensor | None:
        if phi.offset is None:
            return None
        # A constant added before a convolution meets the kernel at every position, padding aside: see BaseLayer.
        return weight.flatten(2).sum(-1) @ phi.offset if weight.ndim > 2 else weight @ phi.offset


class OutputSpace(Space):
    """y = Φ(W x + b), hence W ← ΦW and b ← Φb."""

    name = "output"
    feature = "output"

    def width(self, in_features: int, out_features: int) -> int:
        return out_features

    def forward(self, base: Callable[[Tensor], Tensor], phi: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return phi(base(x))

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def weight(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        return matrix.view(shape)

    def fold(self, matrix: Tensor, delta: Matrix) -> Matrix:
        return delta.before(matrix)

    def fold_bias(self, weight: Tensor, bias: Tensor | None, phi: Phi) -> Tensor | None:
        moved = None if bias is None else phi.delta.before(bias[:, None]).tensor()[:, 0]
        if phi.offset is None or moved is None:
            return phi.offset if moved is None else moved
        return moved + phi.offset


SPACES: dict[str, Space] = {space.name: space for space in (InputSpace(), OutputSpace())}


def get_space(name: str) -> Space:
    """The space of that name; ValueError names the two there are."""
    if name not in SPACES:
        raise ValueError(f"space={name!r} is not a feature space; write space='input' or space='output'.")
    return SPACES[name]

"""The learnt transfer: an adapter, layer by layer, through the maps between the two bases' features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from xadapt.contract import Adapter, Carried, Siblings
from xadapt.counterparts import Side as Widths
from xadapt.folding import Layer
from xadapt.kinds import PeftKind
from xadapt.matrix import LowRank
from xadapt.truncate import Truncation, truncate
from xadapt.update import Update
from xadapt_feature.spaces import get_space
from xadapt_weight.pairs import LayerPair, pairs_of
from xadapt_weight.writing import Part, feature_adapter, lora_adapter

from .maps import FeatureMap
from .on_data import error_on_data, guess_of_inputs, input_form, output_form, with_constant
from .watching import Site

Evidence = dict[str, float | str]


@dataclass(frozen=True)
class Source:
    """What is known of the inputs of a source layer: enough to re-express an update on it."""

    gram: Tensor  # E xxᵀ (in, in)
    mean: Tensor  # E x (in,)


@dataclass(frozen=True)
class Alignment:
    """A transfer that has looked at both bases' features.

    With x′ ≈ T x of a layer's inputs and y′ ≈ S y of its outputs, and x ≈ R x′, y ≈ Q y′:

    =========  ======================================  ===================
    space      wanted on the target                    so
    =========  ======================================  ===================
    parameter  ΔW′ x′ ≈ S ΔW x                         ΔW′ = S ΔW R
    input      Δ′ x′ ≈ T Δ x                           Δ′ = T Δ R
    output     Δ′ y′ ≈ S Δ y                           Δ′ = S Δ Q
    =========  ======================================  ===================
    """

    kind: PeftKind  # what is written
    space: str
    agree: Widths
    maps: Mapping[Site, FeatureMap]  # by the source's site
    sources: Mapping[str, Source]  # by path, where updates are re-expressed
    tokens: Mapping[Site, int]
    ridge: float
    dtype: torch.dtype
    never_ran: Mapping[str, str] = field(default_factory=dict)

    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        """The adapter on the layers of the target. Reads the adapted layers of the source, one at a time.

        Raises:
            ValueError: this was learnt for an adapter on other layers, or an update is of no low rank.
        """
        pairs, left_out = pairs_of(adapter, bases, self.agree)
        left_out = {**left_out, **self.never_ran}
        weights = bases.source.weights()
        parts: dict[str, Part] = {}
        evidence: dict[str, Evidence] = {}
        for pair in pairs:
            if pair.source.path not in self.never_ran:
                parts[pair.path], evidence[pair.path] = self._carry(adapter, pair, weights)
        write = lora_adapter if self.space == "parameter" else feature_adapter
        return Carried(
            adapter=write(self.kind, parts, bases.target.modules(), adapter), evidence=evidence, left_out=left_out
        )

    def _carry(self, adapter: Adapter, pair: LayerPair, weights: Mapping[str, Tensor]) -> tuple[Part, Evidence]:
        found: Evidence = {}
        if self.space == "parameter":
            opened = pair.open(weights, self.dtype)
            matrix, constant = opened.matrix, opened.moved
            before, behind = self._before(pair, found), self._behind(pair, found)
            carried = _through(matrix, behind.there if behind else None, before.back if before else None)
            constant = constant if constant is None or behind is None else behind.there.to(constant) @ constant
        else:
            if adapter.kind == self.kind:
                matrix, constant = _own(pair.source, self.space, self.dtype)
            else:
                matrix, constant, found["error"] = self._converted(pair, weights)
            side = self._before(pair, found) if self.space == "input" else self._behind(pair, found)
            assert side is not None
            carried = _through(matrix, side.there, side.back)
            constant = None if constant is None else side.there.to(constant) @ constant
        if carried.rank > min(carried.shape):
            carried, _ = truncate(carried, Truncation(rank=min(carried.shape)))
        return Part(pair, carried, constant), found

    def _before(self, pair: LayerPair, found: Evidence) -> FeatureMap | None:
        if isinstance(pair.module, nn.Embedding):  # it reads token ids, which are the same in both
            return None
        return self._map(Site(pair.source.path, "input"), "inputs", found)

    def _behind(self, pair: LayerPair, found: Evidence) -> FeatureMap | None:
        return self._map(Site(pair.source.path, "output"), "outputs", found)

    def _map(self, site: Site, name: str, found: Evidence) -> FeatureMap:
        if site not in self.maps:
            raise ValueError(
                f"{site.path}: this alignment was learnt for an adapter on other layers ({len(self.maps)} feature spaces). Call "
                "fit with this adapter."
            )
        chosen = self.maps[site]
        found |= {name: chosen.error, f"{name}_map": chosen.name, "tokens": float(self.tokens[site])}
        return chosen

    def _converted(self, pair: LayerPair, weights: Mapping[str, Tensor]) -> tuple[LowRank, Tensor | None, float]:
        """The update as a map of features on the source, its constant, and what of its effect on the data is lost."""
        path = pair.source.path
        if len(pair.source.shape) > 2 or isinstance(pair.source.module, nn.Embedding):
            raise ValueError(
                f"{path} is no linear, and only on linears an update can be re-expressed on data. Use pinv_{self.space}, or "
                "aligned, which keeps it a LoRA."
            )
        if path not in self.sources:
            raise ValueError(
                f"{path}: this alignment was learnt for an adapter of another kind. Call fit with this adapter."
            )
        opened, known = pair.open(weights, self.dtype), self.sources[path]
        weight, gram, update = opened.weight.to(opened.matrix.left), known.gram.to(opened.matrix.left), opened.matrix
        moved = opened.moved
        if self.space == "output" and opened.bias is not None:
            # The adapter acts on Wx + b, and the update left b alone: on (x, 1) both are matrices.
            column = torch.zeros_like(opened.bias) if moved is None else moved
            weight = torch.cat([weight, opened.bias[:, None]], dim=1)
            gram = with_constant(gram, known.mean.to(gram))
            update = _with_column(update, column)
            moved = None
        guess = guess_of_inputs(weight, gram, self.ridge)
        delta = (input_form if self.space == "input" else output_form)(guess, update)
        folded = get_space(self.space).fold(weight, delta)
        assert isinstance(folded, LowRank)
        constant = None if moved is None else (guess @ moved if self.space == "input" else moved)
        return delta, constant, error_on_data(folded, update, gram)


def _own(layer: Layer, space: str, dtype: torch.dtype) -> tuple[LowRank, Tensor | None]:
    """Δ and c of an adapter that is in this space already: what it makes of the identity."""
    width = get_space(space).width(layer.shape[1], layer.shape[0])
    update: Update = layer.terms[0].update(torch.eye(width, dtype=dtype), None)
    if not isinstance(update.matrix, LowRank):
        raise ValueError(
            f"{layer.path}: this adapter's map of the features is of full rank. Make a LoRA of it first: xadapt export --rank 16 "
            "or --energy 0.99, on the source."
        )
    constant = None if update.bias is None else update.bias.to(dtype)
    return LowRank(update.matrix.left.to(dtype), update.matrix.right.to(dtype)), constant


def _through(matrix: LowRank, left: Tensor | None, right: Tensor | None) -> LowRank:
    """left M right, where M may act on the positions of a kernel as well: (m, n·kernel)."""
    a, b = matrix.right, matrix.left
    if right is not None:
        positions = a.view(a.shape[0], right.shape[0], -1)  # (r, n, kernel)
        a = torch.einsum("rnk,nm->rmk", positions, right.to(a)).flatten(1)
    return LowRank(b if left is None else left.to(b) @ b, a)


def _with_column(update: LowRank, column: Tensor) -> LowRank:
    """(ΔW c) as one matrix. Of the update's rank plus one where there is a column."""
    width = update.right.shape[1]
    if not bool(column.any()):
        return LowRank(update.left, torch.cat([update.right, update.right.new_zeros(update.rank, 1)], dim=1))
    last = torch.zeros(1, width + 1).to(update.right)
    last[0, -1] = 1
    right = torch.cat([torch.cat([update.right, update.right.new_zeros(update.rank, 1)], dim=1), last])
    return LowRank(torch.cat([update.left, column[:, None]], dim=1), right)

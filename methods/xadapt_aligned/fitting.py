"""From the data to an `Alignment`: which features are needed, and which map each pair of feature spaces gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from xadapt.contract import Adapter, Siblings
from xadapt.counterparts import Side as Widths
from xadapt.kinds import PeftKind
from xadapt.update import to_stored
from xadapt_weight.pairs import LayerPair, pairs_of

from .alignment import Alignment, Source
from .choosing import choose, choose_rigid
from .collecting import collect
from .maps import MAPS, NEEDS_EQUAL_WIDTHS, FeatureMap, probed
from .moments import Moments
from .watching import Site

if TYPE_CHECKING:
    from .methods import Aligned

_EQUAL: dict[str, Widths] = {"parameter": "both", "input": "input", "output": "output"}


def fit(options: Aligned, adapter: Adapter, bases: Siblings, batches: Iterable[Any], kind: PeftKind) -> Alignment:
    """See `Aligned.fit`."""
    dtype = getattr(torch, options.precision)
    agree: Widths = _EQUAL[options.space] if options.map in NEEDS_EQUAL_WIDTHS else "neither"
    pairs, _ = pairs_of(adapter, bases, agree)
    converts = options.space != "parameter" and adapter.kind != kind
    sites = {
        Site(pair.source.path, side): Site(pair.path, side)
        for pair in pairs
        for side in ("input", "output")
        if _is_needed(pair, side, options.space)
    }
    moments = collect(sites, bases, batches, dtype)
    never_ran = {
        site.path: "it never ran on the calibration data, or its counterpart did not"
        for site in sites.keys() - moments.keys()
    }
    return Alignment(
        kind=kind,
        space=options.space,
        agree=agree,
        maps=_maps(options, moments, pairs, bases),
        sources={site.path: _source(found) for site, found in moments.items() if converts and site.side == "input"},
        tokens={site: found.count for site, found in moments.items()},
        ridge=options.ridge,
        dtype=dtype,
        never_ran=never_ran,
    )


def _is_needed(pair: LayerPair, side: str, space: str) -> bool:
    if side == "input" and isinstance(pair.module, torch.nn.Embedding):
        return False
    return side == "input" or space != "input"  # outputs are probed through the inputs' map


def _maps(
    options: Aligned, moments: Mapping[Site, Moments], pairs: Iterable[LayerPair], bases: Siblings
) -> dict[Site, FeatureMap]:
    """One map per feature space: sites that share moments share it. First the inputs, by which the outputs are probed."""
    made: dict[int, FeatureMap] = {}

    def map_of(site: Site, found: Moments) -> FeatureMap:
        if id(found) not in made:
            _check_enough(options.map, site, found)
            made[id(found)] = _found(options, found, "input")
        return made[id(found)]

    maps = {site: map_of(site, found) for site, found in moments.items() if site.side == "input"}
    for pair in pairs:
        before, behind = Site(pair.source.path, "input"), Site(pair.source.path, "output")
        if behind not in moments:
            continue
        found = moments[behind]
        if before in maps and options.probe and options.map != "identity" and len(pair.shape) == 2:
            weights = _weight(pair, bases), pair.target_weight(bases.target.weights())
            found = probed(found, weights, moments[before], maps[before].there, options.probe)
        _check_enough(options.map, behind, found)
        maps[behind] = _found(options, found, "output")
    return maps


def _found(options: Aligned, moments: Moments, side: str) -> FeatureMap:
    if options.map == "choose":
        return (choose if side == "input" else choose_rigid)(moments, options.ridge, options.stay)
    return MAPS[options.map](moments, options.ridge)


def _weight(pair: LayerPair, bases: Siblings) -> torch.Tensor:
    return to_stored(pair.source.module, bases.source.weights()[pair.source.weight_name])


def _check_enough(name: str, site: Site, moments: Moments) -> None:
    widest = max(moments.widths)
    if name != "identity" and moments.count < widest:
        raise ValueError(
            f"The calibration data has {moments.count} tokens at the {site.side} of {site.path}, which is {widest} wide: fewer than "
            f"that say nothing of most directions. Give at least {widest} tokens, better {4 * widest}."
        )


def _source(moments: Moments) -> Source:
    return Source(moments.source / moments.count, moments.total / moments.count)

"""One pass over the data, through both bases at once: the second moments of the features at each pair of sites."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xadapt.contract import Siblings
from xadapt.data.counting import without_labels
from xadapt.feature_rows import rows_of
from xadapt.progress import track

from .moments import Moments
from .same_tokens import check_ids, check_tokenizers
from .watching import Seen, Site, run, watching

Shared = dict[Site, Site]  # site of the source → the one whose moments are its own too


def collect(
    sites: Mapping[Site, Site], bases: Siblings, batches: Iterable[Any], dtype: torch.dtype
) -> dict[Site, Moments]:
    """Moments by the source's site; sites that read the same features share theirs. Sites that never ran are absent.

    Memory: the moments, and the features of one batch.

    Args:
        sites: of the source → of the target.
        batches: dicts of arguments for both forwards. Read once.
        dtype: to sum up in.

    Raises:
        TypeError, ValueError: no batch, a batch of the wrong sort, other token ids or positions in the two bases, or features
            that are not finite; the message names the layer.
    """
    check_tokenizers(bases)
    networks = {"source": bases.source.module(), "target": bases.target.module()}
    moments: dict[Site, Moments] = {}
    leaders: Shared | None = None
    read = 0
    for batch in track(batches, "looking at features"):
        given = without_labels(checked(batch))
        check_ids(given, networks)
        with (
            watching(networks["source"], sites.keys()) as there,
            watching(networks["target"], set(sites.values())) as here,
        ):
            run(networks["source"], given, "source")
            run(networks["target"], given, "target")
        if leaders is None:
            leaders = _leaders(sites, there, here)
        for site in dict.fromkeys(leaders.values()):
            _add(moments, site, sites[site], there, here, networks, given, dtype)
        read += 1
    if not read or leaders is None:
        raise ValueError("There is no calibration data: not one batch was given. Unlabelled inputs are enough.")
    if not moments:
        raise ValueError("None of the adapter's layers runs on the calibration data, in both bases.")
    _check_finite(moments, sites)
    return {site: moments[leader] for site, leader in leaders.items() if leader in moments}


def checked(batch: Any) -> dict[str, Any]:
    """A batch as a dict."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"A batch is a dict of arguments for the bases' forward, such as {{'input_ids': …}}; got {type(batch).__name__}."
        )
    return dict(batch)


def _leaders(sites: Mapping[Site, Site], there: Seen, here: Seen) -> Shared:
    """Which sites see the same features in both bases, on the first batch: q, k and v do, and it need be counted once.

    What reads the same tensor once does so always, as the networks are the same for every batch.
    """
    first: dict[Any, Site] = {}
    return {
        site: first.setdefault((there.key(site) or site, here.key(other) or other), site)
        for site, other in sites.items()
    }


def _add(
    moments: dict[Site, Moments],
    site: Site,
    other: Site,
    there: Seen,
    here: Seen,
    networks: Mapping[str, nn.Module],
    batch: Mapping[str, Any],
    dtype: torch.dtype,
) -> None:
    ours, theirs = there.features(site), here.features(other)
    if not ours and not theirs:
        return
    source, target = networks["source"].get_submodule(site.path), networks["target"].get_submodule(other.path)
    x = [rows_of(features, source, batch) for features in ours]
    y = [rows_of(features, target, batch) for features in theirs]
    lengths = [sum(len(part) for part in parts) for parts in (x, y)]
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"{site.path} has {lengths[0]} positions in a batch, and {other.path} of the target has {lengths[1]}: only features at "
            f"the same positions can be compared. Features are {_shapes(ours)} and {_shapes(theirs)}. Do both bases get the same "
            "lengths (tokenizer, image size, padding), and do their layers do the same work?"
        )
    x_all, y_all = torch.cat(x), torch.cat(y)
    if site not in moments:
        like = torch.empty(0, dtype=dtype, device=y_all.device)
        moments[site] = Moments.empty(x_all.shape[1], y_all.shape[1], like)
    moments[site].add(x_all, y_all)


def _shapes(features: list[Tensor]) -> str:
    return ", ".join("×".join(map(str, part.shape)) for part in features) or "none"


def _check_finite(moments: Mapping[Site, Moments], sites: Mapping[Site, Site]) -> None:
    for site, found in moments.items():
        for role, place, gram in (("source", site, found.source), ("target", sites[site], found.target)):
            if not bool(torch.isfinite(gram).all()):
                raise ValueError(
                    f"The {place.side} of {place.path} in the {role} holds NaN or infinity on the calibration data. Half "
                    "precision overflows in some models: load this base in bfloat16 or float32."
                )

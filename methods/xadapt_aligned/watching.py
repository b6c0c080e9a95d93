"""What goes into the adapted layers of a network and comes out, while it runs on one batch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from xadapt.watching import watching as runs_of

Side = Literal["input", "output"]


class Site(NamedTuple):
    """A feature space of a network: before or behind one of its layers."""

    path: str
    side: Side


class Seen:
    """The features of one batch at each site, in calls: a layer may run several times, as shared blocks do.

    Layers that read the same tensor share it: `key` is then the same for their sites.
    """

    def __init__(self) -> None:
        self._calls: dict[Site, list[int]] = {}
        self._features: dict[int, Tensor] = {}
        self._numbers: dict[tuple[int, int], int] = {}
        self._originals: list[Tensor] = []  # alive, or another tensor could get the same id

    def note(self, site: Site, features: Tensor) -> None:
        """Copied, since a network may go on to change them in place."""
        identity = (id(features), features._version)
        if identity not in self._numbers:
            number = len(self._numbers)
            self._numbers[identity] = number
            self._originals.append(features)
            self._features[number] = features.detach().clone()
        self._calls.setdefault(site, []).append(self._numbers[identity])

    def key(self, site: Site) -> tuple[int, ...] | None:
        """Equal for sites with the same features; None where the layer did not run."""
        return tuple(self._calls[site]) if site in self._calls else None

    def features(self, site: Site) -> list[Tensor]:
        return [self._features[number] for number in self._calls.get(site, ())]


@contextmanager
def watching(network: nn.Module, sites: Collection[Site]) -> Iterator[Seen]:
    """Notes the features at these sites until the end of the block. The network is in eval mode meanwhile."""
    seen = Seen()

    def note(path: str, module: nn.Module, read: Tensor | None, result: Tensor | None) -> None:
        for site, features in ((Site(path, "input"), read), (Site(path, "output"), result)):
            if site not in sites:
                continue
            if features is None:
                raise ValueError(f"{path} has no tensor as its {site.side}, so its features cannot be looked at.")
            seen.note(site, features)

    with runs_of(network, (site.path for site in sites), note):
        yield seen


def run(network: nn.Module, batch: Mapping[str, Any], role: str) -> Any:
    """The network on a batch, without gradients. ValueError where its forward does not take it."""
    where = next((p.device for p in network.parameters()), torch.device("cpu"))
    moved = {name: value.to(where) if isinstance(value, Tensor) else value for name, value in batch.items()}
    try:
        with torch.no_grad():
            return network(**moved)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The {role}'s forward ({type(network).__name__}) does not take a batch of {', '.join(batch)}: {error}. A batch is a "
            "dict of arguments that both bases' forwards take."
        ) from error

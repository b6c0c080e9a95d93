"""`TrainA4A.fit`, and the transfer that it returns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from xadapt.contract import Adapter, Base

from .files import read_ip_adapter
from .matching import fingerprint_of
from .model import A4AModel
from .objective import objective_of
from .source import IPAdapterSource
from .training import train

if TYPE_CHECKING:
    from .methods import TrainA4A

_MODEL_OPTIONS = (
    "depth",
    "head_dim",
    "coupling_ratio",
    "coupling_width",
    "share",
    "projection",
    "alignment",
    "mapping",
    "max_rows",
    "faceid_plus_v2",
)


class LearnedA4A(nn.Module):
    """The transfer of one IP-Adapter to one target, learnt."""

    def __init__(self, model: A4AModel, ip_adapter: str, losses: list[float]) -> None:
        super().__init__()
        self.model = model
        self.ip_adapter = ip_adapter  # its fingerprint before training
        self.losses = losses

    def transfer(self, adapter: Adapter, source: Base, target: Base) -> Adapter:
        """The A4A adapter, for the IP-Adapter and the target it was learnt for."""
        from .methods import A4A_KIND

        _check_kind(adapter)
        given = IPAdapterSource.load(adapter.tensors)
        if fingerprint_of(given) != self.ip_adapter:
            raise ValueError("This transfer was learnt for another IP-Adapter. Fit one for this: TrainA4A(…).fit(…).")
        tensors = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        return Adapter(kind=A4A_KIND, config=model_config(self.model), tensors=tensors)


def fit(options: TrainA4A, adapter: Adapter, target: Base, batches: Iterable[Any]) -> LearnedA4A:
    """Trains a fresh A4A adapter."""
    _check_kind(adapter)
    network = target.module()
    held = read_ip_adapter(adapter.tensors)
    given = fingerprint_of(IPAdapterSource.from_tensors(held))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = A4AModel.from_ip_adapter(
            held.flat(), network, **{name: getattr(options, name) for name in _MODEL_OPTIONS}
        )
    model.to(next(network.parameters()).device)
    groups = model.param_groups(options.lr1, options.lr2, options.lr3, train_pta=options.train_pta)
    losses = train(
        model,
        network,
        batches,
        objective_of(network, options.prediction, options.scheduler),
        optimizer=torch.optim.AdamW(groups, weight_decay=options.weight_decay),
        steps=options.steps,
        generator=torch.Generator().manual_seed(options.seed),
        image_drop=options.image_drop,
    )
    return LearnedA4A(model, given, losses)


def _check_kind(adapter: Adapter) -> None:
    from .methods import IP_ADAPTER

    if adapter.kind != IP_ADAPTER:
        raise ValueError(f"A4A reads adapters of kind {IP_ADAPTER.name!r}, not {adapter.kind.name!r}.")


def model_config(model: A4AModel) -> dict[str, Any]:
    """The arguments with which the model can be built again."""
    return {name: value for name, value in dict(model.config).items() if not name.startswith("_")}

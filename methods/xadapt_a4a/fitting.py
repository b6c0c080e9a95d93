"""`TrainA4A.fit`, and the transfer that it returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn

from xadapt.contract import Adapter, Base, Carried, Siblings

from .accelerators import accelerator_for
from .data import Encodable
from .encoding import own_pipeline
from .files import read_ip_adapter
from .matching import fingerprint_of
from .model import A4AModel
from .objective import objective_of
from .reference import ReferenceAdapter
from .run import Observer, Run
from .source import IPAdapterSource
from .stream import as_batches
from .trainer import Trainer

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
_MAY_CHANGE = {  # in a run that goes on
    *("steps", "checkpointing", "checkpoints", "checkpoint_every", "keep_checkpoints", "log_with"),
    *("accumulate", "mixed_precision"),  # the trainer records what they come to
    *("pipeline", "image_encoder", "cache"),  # folders may move; the data itself is compared
    "max_rows",
}


class LearnedA4A(nn.Module):
    """The transfer of one IP-Adapter to one target, learnt."""

    def __init__(self, model: A4AModel, ip_adapter: str, losses: list[float]) -> None:
        super().__init__()
        self.model = model
        self.ip_adapter = ip_adapter  # its fingerprint before training
        self.losses = losses

    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        """The A4A adapter, for the IP-Adapter and the target it was learnt for."""
        from .methods import A4A_KIND

        _check_kind(adapter)
        given = IPAdapterSource.load(adapter.tensors)
        if fingerprint_of(given) != self.ip_adapter:
            raise ValueError("This transfer was learnt for another IP-Adapter. Fit one for this: TrainA4A(…).fit(…).")
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
        config = model_config(self.model)
        widths: dict[str, Mapping[str, float | str]] = {
            layer: {"width": width} for layer, width in zip(config["target_layers"], config["target_dims"], strict=True)
        }
        return Carried(adapter=Adapter(kind=A4A_KIND, config=config, tensors=tensors), evidence=widths)


def fit(
    options: TrainA4A,
    adapter: Adapter,
    target: Base,
    batches: Iterable[Any],
    observer: Observer | None = None,
    accelerator: Accelerator | None = None,
) -> LearnedA4A:
    """Trains a fresh A4A adapter."""
    _check_kind(adapter)
    network = target.module()
    held = read_ip_adapter(adapter.tensors)
    source = IPAdapterSource.from_tensors(held, shortcut=options.faceid_plus_v2)
    given = fingerprint_of(IPAdapterSource.from_tensors(held))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = A4AModel.from_ip_adapter(
            held.flat(), network, **{name: getattr(options, name) for name in _MODEL_OPTIONS}
        )
    file = adapter.config.get("file", "") if isinstance(adapter.config, dict) else ""
    model.register_to_config(ip_adapter=file)
    pipeline = options.pipeline or own_pipeline(target)
    schedule = (options.scheduler, None) if options.scheduler else (pipeline, "scheduler")
    objective = objective_of(network, options.prediction, *schedule)
    with accelerator_for(
        accelerator,
        accumulate=options.accumulate,
        mixed_precision=options.mixed_precision,
        log_with=options.log_with,
        folder=options.checkpoints,
    ) as ours:
        stream = as_batches(batches.encoded(source, network, ours) if isinstance(batches, Encodable) else batches)
        trainer = Trainer(
            model, network, objective, lambda one: _optimizer(one, options), _run(options, model), ours, observer
        )
        losses = trainer.train(stream)
    return LearnedA4A(model, given, losses)


def _optimizer(model: ReferenceAdapter, options: TrainA4A) -> torch.optim.Optimizer:
    assert isinstance(model, A4AModel)
    groups = model.param_groups(options.lr1, options.lr2, options.lr3, train_pta=options.train_pta)
    return torch.optim.AdamW(groups, weight_decay=options.weight_decay)


def _run(options: TrainA4A, model: A4AModel) -> Run:
    settings = {one.name: getattr(options, one.name) for one in fields(options) if one.name not in _MAY_CHANGE}
    prints = ("ip_adapter_fingerprint", "target_fingerprint", "target_class")
    settings |= {name: model.config[name] for name in prints}
    return Run(
        steps=options.steps,
        seed=options.seed,
        image_drop=options.image_drop,
        text_drop=options.text_drop,
        both_drop=options.both_drop,
        ema=options.ema,
        max_grad_norm=options.max_grad_norm,
        recompute=options.checkpointing,
        checkpoints=options.checkpoints,
        checkpoint_every=options.checkpoint_every,
        keep_checkpoints=options.keep_checkpoints,
        settings=settings,
    )


def _check_kind(adapter: Adapter) -> None:
    from .methods import IP_ADAPTER

    if adapter.kind != IP_ADAPTER:
        raise ValueError(f"A4A reads adapters of kind {IP_ADAPTER.name!r}, not {adapter.kind.name!r}.")


def model_config(model: A4AModel) -> dict[str, Any]:
    """The arguments with which the model can be built again."""
    return {name: value for name, value in dict(model.config).items() if not name.startswith("_")}

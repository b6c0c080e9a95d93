"""`Distil.fit`, and the transfer that it returns."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel

from xadapt.contract import Adapter, Carried, Siblings
from xadapt.peft_internals import BaseTunerLayer
from xadapt.reading import detach
from xadapt_aligned.collecting import checked
from xadapt_aligned.same_tokens import check_ids, check_tokenizers

from .attaching import attached
from .resuming import digest
from .training import Run, train

if TYPE_CHECKING:
    from .methods import Distil

_NOT_OF_THE_RESULT = ("checkpoint", "save_every")


@dataclass(frozen=True)
class Distilled:
    """The transfer of one adapter to one target, learnt."""

    adapter: Adapter
    source: str  # the source adapter's digest
    losses: list[float]  # of each step

    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        """The trained adapter. Evidence is of the network as a whole, so it is under the path of its root, ""."""
        if digest(adapter.tensors) != self.source:
            raise ValueError("This was learnt from another adapter. Fit one for this: Distil(…).fit(…).")
        own = replace(self.adapter, tensors={name: tensor.clone() for name, tensor in self.adapter.tensors.items()})
        tenth = max(1, len(self.losses) // 10)
        ends = {"loss_at_first": self.losses[:tenth], "loss_at_last": self.losses[-tenth:]}
        evidence: dict[str, float | str] = {name: sum(part) / len(part) for name, part in ends.items()}
        return Carried(adapter=own, evidence={"": evidence})


def fit(options: Distil, adapter: Adapter, bases: Siblings, batches: Iterable[Any]) -> Distilled:
    """See `Distil.fit`. Both networks are in memory, with an adapter each for the time being."""
    check_tokenizers(bases)
    first = _first(batches)
    networks = {"source": bases.source.module(), "target": bases.target.module()}
    check_ids(first, networks)
    if networks["source"] is networks["target"]:
        raise ValueError(
            "Source and target are the same live network, which cannot hold two adapters: pass a copy of it."
        )
    with ExitStack() as stack:
        teacher = stack.enter_context(attached(networks["source"], adapter.config, adapter))
        config = _config(options, adapter, bases, teacher)
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            student = stack.enter_context(attached(networks["target"], config))
        settings = {
            **{name: value for name, value in dataclasses.asdict(options).items() if name not in _NOT_OF_THE_RESULT},
            "kind": options.kind.name,
            "adapter": digest(adapter.tensors),
            "first_batch": digest(first),
            "layers": digest({name: parameter.shape for name, parameter in student.named_parameters()}),
        }
        losses = train(Run(options, teacher.eval(), student.eval(), settings), batches)
        found = detach(student)
        learnt = {name: tensor.detach().clone() for name, tensor in found.tensors.items()}
    return Distilled(replace(found, kind=options.kind, tensors=learnt), digest(adapter.tensors), losses)


def _first(batches: Iterable[Any]) -> dict[str, Any]:
    if iter(batches) is batches:
        raise TypeError(
            "The batches are an iterator, which can be read only once, and training reads them again and again. Pass a list, a "
            "DataLoader, or another object that starts anew with every loop."
        )
    for batch in batches:
        return checked(batch)
    raise ValueError("There is nothing to learn from: not one batch was given. Unlabelled inputs are enough.")


def _config(options: Distil, adapter: Adapter, bases: Siblings, teacher: PeftModel) -> PeftConfig:
    make: Any = options.kind.config()
    config: PeftConfig = make(
        r=options.rank,
        lora_alpha=options.rank if options.alpha is None else options.alpha,
        target_modules=_named(options.targets) if options.targets else _counterparts(bases, teacher),
        task_type=getattr(adapter.config, "task_type", None),
    )
    return config


def _named(targets: str) -> str | list[str]:
    names = [name.strip() for name in targets.split(",")]
    plain = targets != "all-linear" and all(re.fullmatch(r"[\w.]+", name) for name in names)
    return names if plain else targets


def _counterparts(bases: Siblings, teacher: PeftModel) -> str:
    adapted = [
        path
        for path, module in teacher.get_base_model().named_modules()
        if isinstance(module, BaseTunerLayer) and ".base_layer" not in path
    ]
    known: Mapping[str, None] = dict.fromkeys(line.target for path in adapted for line in bases.modules.of(path))
    if not known:
        raise ValueError(
            f"None of the adapter's {len(adapted)} layers has a counterpart in {bases.target.name}. Say which layers to train: "
            "targets='all-linear', or names with commas."
        )
    return "|".join(re.escape(path) for path in known)

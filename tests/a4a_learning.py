"""Short trainings of A4A on tiny models, for the tests of its trainer. Other processes import them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.a4a_models import batch_for, ip_adapter, pixart_like
from tests.a4a_pipes import make_target
from xadapt.base import LiveBase
from xadapt.siblings import Pair
from xadapt_a4a import TrainA4A
from xadapt_a4a.fitting import LearnedA4A
from xadapt_a4a.run import Progress

QUICK: dict[str, Any] = {"steps": 6, "depth": 1, "lr1": 1e-3, "lr2": 1e-3, "lr3": 1e-3}


def batches(number: int = 4, size: int = 4) -> list[dict[str, Any]]:
    return [batch_for(pixart_like(), size, seed) for seed in range(number)]


def learn(
    data: Any = None, target: nn.Module | None = None, given: dict[str, Any] | None = None, **options: Any
) -> Any:
    target = target or pixart_like()
    data = batches() if data is None else data
    return TrainA4A(**{**QUICK, **options}).fit(ip_adapter(), Pair(None, LiveBase(target)), data, **(given or {}))


def weights(learned: LearnedA4A) -> dict[str, Tensor]:
    return learned.model.state_dict()


def same(one: LearnedA4A, other: LearnedA4A) -> bool:
    return one.losses == other.losses and all(
        torch.equal(weights(one)[name], weights(other)[name]) for name in weights(one)
    )


def learn_images(folder: Path, **options: Any) -> Any:
    chosen = TrainA4A(
        **{**QUICK, "steps": 2, "batch_size": 2, "text_drop": 0.3},
        **{"pipeline": str(folder / "pipeline"), "image_encoder": str(folder / "encoder")},
        **options,
    )
    bases = Pair(None, LiveBase(make_target("sd15")))
    return chosen.fit(ip_adapter(), bases, chosen.batches(folder / "images", bases))


class Stop(Exception):
    pass


def stop_at(step: int) -> Any:
    def observer(progress: Progress) -> None:
        if progress.step == step:
            raise Stop

    return {"observer": observer}

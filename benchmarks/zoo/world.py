"""What the zoo asks of a part: a source, its siblings, adapters trained on the source, and how well a model does a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from xadapt.contract import Adapter

Arguments = Mapping[str, Tensor]  # of a forward


class World(Protocol):
    """One part for one seed. Everything is made when it is first asked for, and kept on a shelf."""

    part: str
    seed: int
    siblings: tuple[str, ...]
    tasks: tuple[str, ...]
    spaces: tuple[str, ...]
    distil: tuple[int, float]  # steps and learning rate of a method that trains

    def source(self) -> nn.Module: ...

    def sibling(self, name: str) -> nn.Module: ...

    def adapter(self, task: str, space: str) -> Adapter: ...  # trained on the source

    def retrained(self, sibling: str, task: str) -> nn.Module: ...  # a LoRA trained on that sibling, merged

    def calibration(self, task: str, space: str, much: bool) -> Sequence[Arguments]: ...

    """Unlabelled inputs: the task's, more of them for methods that train, and old ones, which do not count."""

    def unlabelled(self, task: str, space: str) -> list[Arguments]: ...  # the task's inputs alone, others again

    def score(self, model: nn.Module, sibling: str, task: str) -> float: ...  # 0 to 1, on what nothing else has seen

    def kept(self, model: nn.Module, sibling: str) -> float: ...  # the same of what the models could do before

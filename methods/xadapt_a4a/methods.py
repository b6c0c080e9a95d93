"""What this package registers: the method `a4a`, from IP-Adapters to A4A adapters, which has to be learnt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from xadapt.contract import Adapter, Base, Kind, Method, Transfer

PAPER = "A4A: Adapter for Adapter Transfer via All-for-All Mapping for Cross-Architecture Models"


@dataclass(frozen=True, kw_only=True)
class TrainA4A:
    """Learns to carry one IP-Adapter to one target."""

    steps: int = 1000
    lr1: float = 1e-4  # of the learnable features and the blocks
    lr2: float = 1e-5  # of projection and alignment
    lr3: float = 1e-5  # of the pretrained adapter
    train_pta: bool = True
    weight_decay: float = 0.01
    image_drop: float = 0.05
    prediction: str = "auto"
    scheduler: str = ""
    depth: int = 4
    head_dim: int = 64
    coupling_ratio: float = 1.0
    coupling_width: int | None = None
    share: str = "width"
    projection: str = "linear"
    alignment: str = "linear"
    mapping: str = "attention"
    max_rows: int = 4096
    faceid_plus_v2: bool = False
    seed: int = 0

    def fit(self, adapter: Adapter, source: Base, target: Base, batches: Iterable[Any]) -> Transfer:
        """The trained transfer. `source` is not opened: the IP-Adapter's own weights are all that is needed of it.

        Args:
            adapter: the IP-Adapter: `IP_ADAPTER` with the tensors of its file.
            batches: dicts of image_embeds, latents, encoder_hidden_states, and what else the target's forward takes.

        Raises:
            ValueError: the adapter is no IP-Adapter, or a batch lacks something.
        """
        from .fitting import fit

        return fit(self, adapter, target, batches)


IP_ADAPTER = Kind(name="ip_adapter")
A4A_KIND = Kind(name="a4a")

A4A = Method(
    name="a4a",
    summary="carries an IP-Adapter to another architecture, by learning",
    paper=PAPER,
    reads=(IP_ADAPTER,),
    writes=A4A_KIND,
    build=TrainA4A,
)

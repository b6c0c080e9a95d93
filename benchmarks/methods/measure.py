"""What is measured of one method in one space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from xadapt import FullAdaConfig, HybridAdaConfig, feature_space
from xadapt_feature import FeatureLayer
from xadapt_feature.hosts import HOSTS

from .settings import FEATURES, RANK, config


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. `start` and `merge_error` are largest absolute differences of outputs of order one."""

    method: str
    start: float  # from the base, before training
    parameters: int  # trainable
    merge_error: float  # from the unmerged adapter, after training
    rank: int  # numerical rank of Φ - I after training

    @property
    def starts_at_identity(self) -> bool:
        return self.start < 1e-6

    @property
    def merges(self) -> bool:
        return self.merge_error < 1e-5

    @property
    def export(self) -> str:
        """A Φ of low rank is a LoRA of that rank on each base, exactly."""
        return f"exact, rank {self.rank}" if self.rank <= FEATURES // 2 else "approximate"


def rows(space: str) -> list[Row]:
    """LoRA, DoRA, every hosted method, and the two that xadapt adds, in this space."""
    named: list[tuple[str, PeftConfig]] = [
        ("LoRA", feature_space(LoraConfig(r=RANK, target_modules=["layer"]), space)),
        ("LoRA, DoRA", feature_space(LoraConfig(r=RANK, target_modules=["layer"], use_dora=True), space)),
    ]
    for method in HOSTS:
        hosted = config(method, ["layer"])
        named.append((type(hosted).__name__.removesuffix("Config"), feature_space(hosted, space)))
    named.append(("full (xadapt)", FullAdaConfig(space=space, target_modules=["layer"])))
    named.append(("hybrid (xadapt)", HybridAdaConfig(space=space, r=RANK, feature_r=1, target_modules=["layer"])))
    return [measure(name, made) for name, made in named]


def measure(name: str, adapter: PeftConfig) -> Row:
    """Attach, train a few steps, merge."""
    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("layer", nn.Linear(FEATURES, FEATURES))
    x = torch.randn(16, FEATURES)
    wanted = torch.randn(16, FEATURES)  # to be turned towards, so that orthogonal methods learn too
    bare = base(x).detach()
    model = get_peft_model(base, adapter).eval()
    start = (model(x) - bare).abs().max().item()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    model.train()
    for _ in range(10):
        optimizer.zero_grad()
        (model(x) - wanted).square().mean().backward()
        optimizer.step()
    model.eval()
    adapted = model(x).detach()
    layer = cast(FeatureLayer, model.get_submodule("base_model.model.layer"))
    phi = layer.folded(["default"], torch.eye(FEATURES), None).matrix.tensor()
    model.merge_adapter()
    return Row(
        method=name,
        start=start,
        parameters=sum(p.numel() for p in trained),
        merge_error=(model(x) - adapted).abs().max().item(),
        rank=int(torch.linalg.matrix_rank(phi, atol=1e-5)),
    )


def markdown(table: list[tuple[Row, Row]]) -> str:
    """The table for people: input space, and output space where it differs."""
    lines = [
        "| method | starts at the identity | trainable parameters | merges | as a plain LoRA |",
        "|---|---|---|---|---|",
    ]
    for given, other in table:
        cells = [
            _both(given.starts_at_identity, other.starts_at_identity),
            _both(given.parameters, other.parameters),
            _both(given.merges, other.merges),
            _both(given.export, other.export),
        ]
        lines.append(f"| {given.method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _both(given: object, other: object) -> str:
    texts = ["yes" if v is True else "no" if v is False else str(v) for v in (given, other)]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} (input), {texts[1]} (output)"

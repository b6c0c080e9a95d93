"""Small models for the tests of the tuners, and an adapter on them that does something: every tensor of it random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from xadapt import InputAdaConfig, OutputAdaConfig
from xadapt_feature import FeatureLayer

SPACES = ("input", "output")
CONFIG: dict[str, Callable[..., PeftConfig]] = {"input": InputAdaConfig, "output": OutputAdaConfig}

# What rounding may do to a result of size one in a few steps of width ≤ 64.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}


class Mlp(nn.Module):
    """Three linears of different widths, the first with a bias, the second without."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.lin0 = nn.Linear(16, 32)
        self.lin1 = nn.Linear(32, 24, bias=False)
        self.head = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(torch.tanh(self.lin1(torch.tanh(self.lin0(x))))))


class OneLayer(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layer(x))


BASE_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 5),
    "linear without bias": lambda: nn.Linear(6, 5, bias=False),
    "wide linear": lambda: nn.Linear(12, 3),
    "Conv1D": lambda: _with_bias(Conv1D(5, 6)),  # transformers': 6 in, 5 out
    "conv1d": lambda: nn.Conv1d(6, 5, 3, padding=1),
    "conv1d, stride, dilation": lambda: nn.Conv1d(6, 5, 3, padding=2, stride=2, dilation=2, bias=False),
    "conv2d": lambda: nn.Conv2d(6, 5, (3, 2), padding=1, stride=(1, 2)),
    "conv2d 1x1": lambda: nn.Conv2d(6, 5, 1, bias=False),
    "conv3d": lambda: nn.Conv3d(6, 5, 2, padding=1),
    "embedding": lambda: nn.Embedding(9, 5),
}


def _with_bias(layer: nn.Module) -> nn.Module:
    nn.init.normal_(cast(Tensor, layer.bias))  # Conv1D starts with zeros, which would hide a bias that is not moved
    return layer


def base_layer(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return BASE_LAYERS[name]()


def features_for(layer: nn.Module, batch: int = 4, seed: int = 5) -> Tensor:
    """A batch that the layer can read: token ids for an embedding, (batch, channels, *positions) for a convolution."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Embedding):
        return torch.randint(0, layer.num_embeddings, (batch, 3), generator=generator)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return torch.randn(batch, layer.in_channels, *(5,) * len(layer.kernel_size), generator=generator)
    width = layer.weight.shape[0] if isinstance(layer, Conv1D) else cast(nn.Linear, layer).in_features
    return torch.randn(batch, 3, width, generator=generator)


def every_case() -> list[tuple[str, str]]:
    """(base layer, space): all but the embedding in input space, which is refused."""
    return [(name, space) for name in BASE_LAYERS for space in SPACES if (name, space) != ("embedding", "input")]


def mlp_batch(rows: int = 5, seed: int = 3) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))


def randomise(model: nn.Module, std: float = 0.3, seed: int = 1) -> None:
    """Give everything trainable random values: what a freshly attached adapter does is nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def attach(model: nn.Module, config: PeftConfig, **options: Any) -> PeftModel:
    """PEFT's `get_peft_model`, which is annotated for transformers' models only."""
    return cast(PeftModel, get_peft_model(cast(Any, model), config, **options))


def load(model: nn.Module, folder: Path, **options: Any) -> PeftModel:
    """PEFT's `PeftModel.from_pretrained`, in evaluation mode."""
    return PeftModel.from_pretrained(cast(Any, model), folder, **options).eval()


def adapted(model: nn.Module, config: PeftConfig, seed: int = 1, std: float = 0.3, **options: Any) -> PeftModel:
    """The model with a random adapter of this config, in evaluation mode."""
    peft_model = attach(model, config, **options)
    randomise(peft_model, std, seed)
    return peft_model.eval()


def with_second(model: PeftModel, config: PeftConfig, name: str = "second", seed: int = 2) -> PeftModel:
    """The model with another random adapter, which is not active."""
    active = model.active_adapters
    model.add_adapter(name, config)
    model.set_adapter(name)
    randomise(model, seed=seed)
    model.base_model.set_adapter(active)
    return model.eval()


def feature_layers(model: nn.Module) -> list[FeatureLayer]:
    return [module for module in model.modules() if isinstance(module, FeatureLayer)]


def train(model: nn.Module, x: Tensor, steps: int = 3, lr: float = 1e-2) -> list[float]:
    """A few steps towards zero output; the losses."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything the model holds."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, Tensor], atol: float = 0.0) -> None:
    """The model holds what it held: the same names, and bit for bit the same values unless told otherwise."""
    now = model.state_dict()
    assert list(now) == list(before)
    for name, tensor in before.items():
        torch.testing.assert_close(now[name], tensor, rtol=0.0, atol=atol, equal_nan=True)

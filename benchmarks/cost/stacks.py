"""The stacks: real blocks of transformers and diffusers with random weights, and the adapters on all their linears."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from xadapt import InputAdaConfig, OutputAdaConfig

from .settings import Cell

DIT_LINEARS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
CONFIGS: dict[str, type[LoraConfig]] = {"lora": LoraConfig, "input": InputAdaConfig, "output": OutputAdaConfig}


class TrainingStep:
    """Forward, loss, backward and AdamW on a fresh stack.

    `variant` "floor" has no adapter: a frozen base and the gradient of its input, which any adapter has to pay.
    """

    def __init__(self, cell: Cell, variant: str) -> None:
        torch.manual_seed(0)
        dtype = getattr(torch, cell.dtype)
        model = (_llama if cell.stack == "llama" else _dit)(cell).to(cell.device, dtype).train()
        model.requires_grad_(False)
        if variant != "floor":
            names = DIT_LINEARS if cell.stack == "dit" else "all-linear"
            model = get_peft_model(model, CONFIGS[variant](r=cell.rank, target_modules=names))
        self.cell = cell
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.hidden = torch.randn(cell.batch, cell.tokens, cell.width, device=cell.device, dtype=dtype)
        self.run = _compiled(model) if cell.compiled else model
        self.forget()

    def forget(self) -> None:
        """A new optimiser, without state."""
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4) if self.trained else None

    def __call__(self) -> None:
        # The input asks for its gradient in every variant: layers below the stack would.
        x = self.hidden.detach().requires_grad_()
        _forward(self.run, x, self.cell).float().square().mean().backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def _compiled(model: nn.Module) -> nn.Module:
    torch.compiler.reset()
    return torch.compile(model)  # type: ignore[return-value]  # typed as a callable


def _llama(cell: Cell) -> nn.Module:
    return LlamaModel(
        LlamaConfig(
            vocab_size=8,
            hidden_size=cell.width,
            intermediate_size=4 * cell.width,
            num_hidden_layers=cell.layers,
            num_attention_heads=cell.width // 64,
            num_key_value_heads=max(1, cell.width // 256),
            use_cache=False,
        )
    )


def _dit(cell: Cell) -> nn.Module:
    side = int(cell.tokens**0.5)
    model: Any = PixArtTransformer2DModel(
        num_attention_heads=cell.width // 64,
        attention_head_dim=64,
        num_layers=cell.layers,
        cross_attention_dim=cell.width,
        sample_size=side,
        patch_size=1,
        caption_channels=cell.width,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )
    return _Blocks(model.transformer_blocks, cell.width)


class _Blocks(nn.Module):
    """PixArt's blocks on hidden states, without what is before and after them."""

    text: Tensor
    time: Tensor

    def __init__(self, blocks: nn.Module, width: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.register_buffer("text", torch.randn(1, 32, width))
        self.register_buffer("time", torch.randn(1, 6 * width))

    def forward(self, x: Tensor) -> Tensor:
        text, time = self.text.expand(len(x), -1, -1), self.time.expand(len(x), -1)
        for block in self.blocks.children():
            x = block(x, encoder_hidden_states=text, timestep=time)
        return x


def _forward(model: nn.Module, x: Tensor, cell: Cell) -> Tensor:
    if cell.stack == "llama":
        output: Tensor = model(inputs_embeds=x).last_hidden_state
        return output
    out: Tensor = model(x)
    return out

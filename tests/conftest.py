"""Tiny models of real architectures, built from their config classes: nothing is downloaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import GPT2LMHeadModel, LlamaForCausalLM

# One thread, here and in the processes that tests start: models this small gain nothing from a second one, the tests run in
# two processes, and sums are made in the same order on every machine.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def make_llama(seed: int = 0, hidden_size: int = 32, layers: int = 2) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def make_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """GPT-2's linears are Conv1D: they store W transposed, and have biases."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def make_unet(seed: int = 0) -> UNet2DConditionModel:
    """Stable Diffusion's U-Net in small, with cross-attention to text features of width 24."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return unet.eval()


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_interrupts() -> None:
    """Some tests press Ctrl-C, which a shell's background jobs are born to ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For what works on as many layers at once as torch has threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    return make_gpt2()


@pytest.fixture
def unet() -> UNet2DConditionModel:
    pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[diffusers]")
    return make_unet()


@pytest.fixture
def llama_like() -> Callable[..., LlamaForCausalLM]:
    """`llama_like(seed=1, hidden_size=64)`: siblings and strangers of the `llama` fixture."""
    return make_llama


@pytest.fixture
def logits() -> Callable[[nn.Module], torch.Tensor]:
    """What a language model answers to one fixed batch of token ids: (2, 7, 64)."""
    ids = torch.arange(14).reshape(2, 7)

    def run(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    return run


@pytest.fixture
def noise() -> Callable[[nn.Module], torch.Tensor]:
    """What a U-Net predicts for one fixed noisy latent and text: (1, 4, 8, 8)."""
    generator = torch.Generator().manual_seed(0)
    latent, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 24, generator=generator)

    def run(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(latent, torch.tensor([10]), encoder_hidden_states=text).sample

    return run


@pytest.fixture
def run_python() -> Callable[..., str]:
    """`run_python(code, **environment)`: what a fresh interpreter prints; it fails with what that wrote to stderr."""

    def run(code: str, **environment: str) -> str:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run

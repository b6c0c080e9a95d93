"""Tiny models that data are made for: with a tokenizer of words, and with a VAE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.conftest import make_llama

WORDS = [*"abcdefghij", "hello", "world", "<unk>"]


def with_tokenizer(folder: Path, words: list[str] = WORDS, template: str | None = None) -> Path:
    """A tiny Llama with a tokenizer that cuts at white space."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    make_llama().save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>")
    if template:
        fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def with_vae(folder: Path, network: Any, name: str = "unet") -> Path:
    """A pipeline folder of `network` under `name` with a tiny VAE."""
    from diffusers import AutoencoderKL

    network.save_pretrained(folder / name)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    vae.save_pretrained(folder / "vae")
    index = {
        "_class_name": "StableDiffusionPipeline",
        name: ["diffusers", type(network).__name__],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder

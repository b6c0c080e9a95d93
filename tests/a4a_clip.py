"""A small CLIP on disk, with its tokenizer and image processor."""

from __future__ import annotations

from pathlib import Path

import torch


def write_clip(folder: Path) -> str:
    """A CLIPModel with random weights for images of 16 pixels and the words a to f."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder.mkdir(exist_ok=True)
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in "abcdef"), *"abcdef"]
    vocabulary = {word: number for number, word in enumerate(words)}
    CLIPTokenizer(vocabulary, []).save_pretrained(folder)  # by files it warns in transformers 5.12
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    return str(folder)

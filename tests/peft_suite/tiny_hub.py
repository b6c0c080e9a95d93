"""A Hugging Face cache of small random models under the names that PEFT's tests ask for, made without the hub.

Each has the architecture and roughly the widths of the model of that name; the weights are random, as theirs are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers as tf

TEXT = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 1000,
    **TEXT,
}
BERT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "vocab_size": 1124,
}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 5, "n_head": 4, "vocab_size": 1000, "n_positions": 512, **TEXT}
CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "vocab_size": 1000,
    "projection_dim": 32,
    **TEXT,
}


def _opt(hidden: int = 16, ffn: int = 4, layers: int = 5, **kwargs: Any) -> Any:
    config = tf.OPTConfig(
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=ffn,
        num_attention_heads=4,
        num_hidden_layers=layers,
        vocab_size=50265,
        max_position_embeddings=100,
        **{**TEXT, "pad_token_id": 1, "bos_token_id": 2},
        **kwargs,
    )
    return tf.OPTForCausalLM(config)


def _gemma3() -> Any:
    config = tf.Gemma3TextConfig(
        **{**LLAMA, "head_dim": 8}, layer_types=["sliding_attention", "full_attention"], sliding_window=64
    )
    return tf.Gemma3ForCausalLM(config)


def _gptj() -> Any:
    return tf.GPTJForCausalLM(tf.GPTJConfig(**{**GPT2, "rotary_dim": 4}))


def _bart() -> Any:
    config = tf.BartConfig(
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4,
        decoder_ffn_dim=4,
        vocab_size=1000,
    )
    return tf.BartForConditionalGeneration(config)


def _nemotron() -> Any:
    mamba = {"mamba_num_heads": 8, "mamba_head_dim": 4, "n_groups": 2, "ssm_state_size": 8, "conv_kernel": 4}
    config = tf.NemotronHConfig(**{**LLAMA, "head_dim": 8}, **mamba, layers_block_type=["mamba", "attention"])
    return tf.NemotronHForCausalLM(config)


def _falcon_mamba() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 1000}
    return tf.FalconMambaForCausalLM(tf.FalconMambaConfig(**sizes, **TEXT))


MODELS: dict[str, Any] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": _opt,
    "peft-internal-testing/opt-125m": lambda: _opt(hidden=64, ffn=256, layers=12),
    "facebook/opt-125m": lambda: _opt(hidden=64, ffn=256, layers=12),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "hf-internal-testing/tiny-random-gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "peft-internal-testing/tiny-random-gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": _gptj,
    "trl-internal-testing/tiny-random-LlamaForCausalLM": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)),
    "peft-internal-testing/tiny-dummy-qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**LLAMA)),
    "hf-internal-testing/tiny-random-MistralForCausalLM": lambda: tf.MistralForCausalLM(tf.MistralConfig(**LLAMA)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": _gemma3,
    "peft-internal-testing/tiny-random-BertModel": lambda: tf.BertModel(tf.BertConfig(**BERT)),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": lambda: tf.RobertaForSequenceClassification(
        tf.RobertaConfig(**BERT)
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": _bart,
    "bert-base-uncased": lambda: tf.BertForSequenceClassification(tf.BertConfig(**BERT)),
    "tiiuae/falcon-mamba-tiny-dev": _falcon_mamba,
    "trl-internal-testing/tiny-NemotronHForCausalLM-nano": _nemotron,
    "peft-internal-testing/tiny-clip-text-2": lambda: tf.CLIPTextModelWithProjection(tf.CLIPTextConfig(**CLIP)),
}


def make(home: Path) -> None:
    """Fill `home` (to be used as HF_HOME) with every model of `MODELS`."""
    tf.utils.logging.disable_progress_bar()
    for name, model in MODELS.items():
        torch.manual_seed(0)
        revision = hashlib.sha1(name.encode()).hexdigest()
        repository = home / "hub" / ("models--" + name.replace("/", "--"))
        model().save_pretrained(repository / "snapshots" / revision)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(revision)

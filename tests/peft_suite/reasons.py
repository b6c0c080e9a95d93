"""Why a test that LoRA passes is not passed by our configs: by what the test says when it fails, or by its name."""

from __future__ import annotations

import re

# (pattern in "test | message", reason)
REASONS: tuple[tuple[str, str], ...] = (
    (
        r"init_lora_weights='|eva_config is refused|TestEvaInitialization",
        "an initialisation computed from the base weight (PiSSA, OLoRA, CorDA, EVA, MiCA): refused, the weight of an "
        "identity says nothing",
    ),
    (
        r"target_parameters is refused|test_repr_lora_paramwrapper",
        "target_parameters: refused, a bare parameter has no features",
    ),
    (r"megatron_config is refused", "Megatron: refused, its linears shard the features"),
    (r"kasa_config is refused|test_kasa_", "KaSA: refused, it truncates the base weight itself"),
    (
        r"alora_invocation_tokens is refused",
        "activated LoRA: refused, it depends on the position and is no map of features",
    ),
    (
        r"an embedding reads token ids"
        r"|InputAda.*(test_alt_weight_tying_tied_model_target_modules|when_model_config_tie_false_target_modules)",
        "embeddings: refused in input space, they read token ids",
    ),
    (
        r"test_lora_with_bias_embedding_raises",
        "lora_bias=True on an embedding: LoRA refuses it, in output space it works",
    ),
    (
        r"'ParameterDict' object has no attribute 'default'|lora_embedding_A\.|of <class 'peft.tuners.lora.layer.Embedding'>",
        "an embedding's adapter is hosted on a linear: its tensors are lora_A and lora_B, not lora_embedding_A and _B",
    ),
    (
        r"test_load_resized_embedding_ignore_mismatched_sizes",
        "an adapter of an embedding's output features does not depend on the vocabulary, so a resized one loads without "
        "the error that the test expects",
    ),
    (
        r"ensure_weight_tying=True with the embedding",
        "ensure_weight_tying with embedding and output head among the targets: refused, an output feature of one is an "
        "input feature of the other (with modules_to_save it works)",
    ),
    (
        r"a convolution with groups=|test_error_raised_if_rank_not_divisible_by_groups",
        "grouped convolutions: refused, Φ mixes channels across the groups",
    ),
    (r"MultiheadAttention|test_mha_", "nn.MultiheadAttention: refused, it reads its weights without calling a layer"),
    (
        r"The adapter adds a constant .* input features",
        "lora_bias=True on a padded convolution in input space: trains, but cannot be merged (no bias at the border)",
    ),
    (
        r"has no bias that could hold it",
        "lora_bias=True on a layer without bias: merging is refused as for LoRA, by a ValueError that names the layer "
        "(the test expects a RuntimeError and PEFT's sentence)",
    ),
    (
        r"TestDynamicDispatch",
        "custom LoRA layers for the user's own module classes: Φ is hosted on the identity, so a replacement for "
        "nn.Linear becomes the hosted layer, and a module that is no linear has no features that we know",
    ),
    (r"TestLayerRepr", "repr starts with the name of our layer, not with lora.Linear"),
    (r"mixed_model\.py", "PeftMixedModel: PEFT has a fixed list of PEFT types for it and refuses any other by name"),
    (
        r"module name can.{1,2}t contain",
        "the test makes an adapter name from the key prefix; ours has a dot in it, which no module name may have",
    ),
    (r"test_hotswap_different_peft_types_raises", "the message names our PEFT type where the test expects LORA"),
    (
        r"test_prepare_model_for_compiled_hotswap\w*_lora_bias",
        "the bias of lora_B is as wide as the adapted features; the test expects the layer's output width",
    ),
    (
        r"test_prepare_model_for_compiled_hotswap_does_not_change_output",
        "equal but for rounding (1e-7): the fused forward gives way to PEFT's; the test allows 1e-8, inputs unseeded",
    ),
    (
        r"test_add_weighted_adapter_with_different_scaling.*assert tensor\(",
        "a threshold on a random approximation (ties, magnitude_prune) at one fixed seed: over 100 seeds the mean "
        "correlation is LoRA's, and LoRA too is below the threshold on one seed in ten",
    ),
)


def reason_for(config: str, test: str, message: str) -> str:
    """The reason, or "open" where there is none that is known."""
    said = f"{config} {test} | {message}"
    return next((reason for pattern, reason in REASONS if re.search(pattern, said, re.DOTALL)), "open")

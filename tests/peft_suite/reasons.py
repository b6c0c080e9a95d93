"""Why a test that LoRA passes is not passed by our configs: by what the test says when it fails, and by its name."""

from __future__ import annotations

import re

# (pattern in "config test | message", reason). A pattern with a test's name has what that test says as well, so that
# another failure of the same test is not taken for this one.
REASONS: tuple[tuple[str, str], ...] = (
    (
        r"init_lora_weights='|eva_config is refused|TestEvaInitialization.*DID NOT WARN",
        "an initialisation computed from the base weight (PiSSA, OLoRA, CorDA, EVA, MiCA): refused, the weight of an "
        "identity says nothing",
    ),
    (r"target_parameters is refused", "target_parameters: refused, a bare parameter has no features"),
    (r"megatron_config is refused", "Megatron: refused, its linears shard the features"),
    (r"kasa_config is refused", "KaSA: refused, it truncates the base weight itself"),
    (
        r"alora_invocation_tokens is refused",
        "activated LoRA: refused, it depends on the position and is no map of features",
    ),
    (
        r"an embedding reads token ids"
        r"|InputAda.*(alt_weight_tying_tied_model_target_modules|tie_false_target_modules).*DID NOT WARN",
        "embeddings: refused in input space, they read token ids",
    ),
    (
        r"OutputAda.*test_lora_with_bias_embedding_raises.*DID NOT RAISE",
        "lora_bias=True on an embedding: LoRA refuses it, in output space it works",
    ),
    (
        r"'ParameterDict' object has no attribute 'default'"
        r"|emb\.lora_embedding_A\.|of <class 'peft\.tuners\.lora\.layer\.Embedding'>",
        "an embedding's adapter is hosted on a linear: its tensors are lora_A and lora_B, not lora_embedding_A and _B",
    ),
    (
        r"OutputAda.*test_load_resized_embedding_ignore_mismatched_sizes.*DID NOT RAISE",
        "an adapter of an embedding's output features does not depend on the vocabulary, so a resized one loads without "
        "the error that the test expects",
    ),
    (
        r"ensure_weight_tying=True with the embedding",
        "ensure_weight_tying with embedding or output head among the targets: refused, an output feature of one is an "
        "input feature of the other (with modules_to_save it works)",
    ),
    (r"a convolution with groups=", "grouped convolutions: refused, Φ mixes channels across the groups"),
    (
        r"MultiheadAttention is no layer",
        "nn.MultiheadAttention: refused, it reads its weights without calling a layer",
    ),
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
        r"TestDynamicDispatch.*(is no layer that can be adapted|= isinstance\()",
        "custom LoRA layers for the user's own module classes: Φ is hosted on the identity, so a replacement for "
        "nn.Linear becomes the hosted layer, and a module that is no linear has no features that we know",
    ),
    (r"TestLayerRepr.*method startswith", "repr starts with the name of our layer, not with lora.Linear"),
    (r"mixed_model\.py", "PeftMixedModel: PEFT has a fixed list of PEFT types for it and refuses any other by name"),
    (
        r"module name can.{1,2}t contain",
        "the test makes an adapter name from the key prefix; ours has a dot in it, which no module name may have",
    ),
    (
        r"Incompatible PEFT types found: (IN|OUT)PUT_ADA and IA3",
        "the message names our PEFT type where the test expects LORA",
    ),
    (
        r"test_prepare_model_for_compiled_hotswap\w*_lora_bias .*assert \d+ (==|in) ",
        "the bias of lora_B is as wide as the adapted features; the test expects the layer's output width",
    ),
    (
        r"test_prepare_model_for_compiled_hotswap_does_not_change_output.*allclose",
        "equal but for rounding (1e-7): the fused forward gives way to PEFT's; the test allows 1e-8, inputs unseeded",
    ),
    (
        r"test_add_weighted_adapter_with_different_scaling\[(ties|magnitude_prune)-.*assert tensor\(",
        "a threshold on an approximation (ties, magnitude_prune) of random matrices at one seed. On 100 seeds the mean "
        "correlations are .50 and .64 for LoRA, .51 and .63 in input space, .51 and .65 in output space; below the "
        "threshold are 10 % and 9 %, 17 % and 21 %, 6 % and 4 % of the seeds",
    ),
    (
        r"OutputAda.*test_add_weighted_adapter_with_different_scaling\[svd-.*assert tensor\(0\.9",
        "svd of two adapters of rank 8, cut to rank 8: Φ is 20 × 20 where the layer is 10 × 20, so the cut takes more "
        "(LoRA on a layer of 20 × 20 has correlations of .97 to .98 too; the test expects .99)",
    ),
    (
        r"test_save_pretrained_targeting_lora_to_embedding_layer.*Regex pattern did not match",
        "PEFT saves an adapted embedding's base weight and warns of it; ours is left out, or it would overwrite a sibling's",
    ),
)


def reason_for(config: str, test: str, message: str) -> str:
    """The reason, or "open" where there is none that is known."""
    said = f"{config} {test} | {message}"
    return next((reason for pattern, reason in REASONS if re.search(pattern, said, re.DOTALL)), "open")

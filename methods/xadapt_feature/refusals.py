"""What cannot work in feature space, by name, each with the reason."""

from __future__ import annotations

from typing import Any

READS_WEIGHT = "it is computed from the base weight, and the weight of an identity layer says nothing"

# Values of `init_lora_weights` that mean something on the identity. A prefix stands for its variants.
WEIGHT_INITS = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga", "mica")

# Options of LoraConfig that are refused when set.
LORA_OPTIONS = {
    "target_parameters": "a bare parameter has no input or output features; name the layer in target_modules",
    "megatron_config": "Megatron's parallel linears shard the features that Φ has to see whole",
    "kasa_config": "KaSA truncates the base weight itself",
    "arrow_config": "Arrow routes between LoRAs by their products with the base weight",
    "alora_invocation_tokens": "activated LoRA depends on the position in the text, so it is no map of the features",
    "use_qalora": "QA-LoRA pools inputs by the groups of a quantised weight",
    "eva_config": READS_WEIGHT,
    "corda_config": READS_WEIGHT,
    "loftq_config": READS_WEIGHT,
    "lora_ga_config": READS_WEIGHT,
}

# PEFT methods that have no input or output form, by PEFT type.
PEFT_TYPES = {
    "BEFT": "it trains the bias only, which an identity layer does not have",
    "LILY": "its layers share their A and B across widths through a router, so it is no map of one layer's features",
    "GLORA": "it rescales the base weight and bias themselves",
    "OSF": "it trains the small singular directions of the base weight, and the identity has none",
    "FROD": "its projections are decompositions of the base weights, and every identity decomposes alike",
    "HIRA": "it multiplies the base weight entry by entry, and of an identity only the diagonal is not zero",
    "PSOFT": "it turns the first singular vectors of the base weight, which of an identity are its first r features",
    "TINYLORA": "it mixes the first singular vectors of the base weight, which of an identity are its first r features",
    "SUPERTUNING": (
        "it trains the largest entries of the base weight, which of an identity are its diagonal; the LoRA that its r adds "
        "is InputAdaConfig and OutputAdaConfig"
    ),
    "SHADOW": "it runs a second model beside the base, not an adapter on a layer",
    "POLY": "it routes between LoRAs by task ids that a layer does not see",
    "XLORA": "it mixes finished LoRAs by a classifier over the whole model",
    "LN_TUNING": "it trains layer norms",
    "TRAINABLE_TOKENS": "it trains rows of the embedding",
    "ADAPTION_PROMPT": "it adds prompts to attention",
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"),
        "it adds prompts, not an adapter on a layer",
    ),
}


def check_options(config: Any) -> None:
    """Raise ValueError for a set option that means nothing in feature space."""
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.lower().startswith(WEIGHT_INITS):
        raise ValueError(
            f"init_lora_weights={init!r} is refused in feature space: {READS_WEIGHT}. "
            "Use True (the default), False, 'gaussian' or 'orthogonal'."
        )
    for name, reason in LORA_OPTIONS.items():
        if getattr(config, name, None):
            raise ValueError(f"{name} is refused in feature space: {reason}. Leave it at its default.")

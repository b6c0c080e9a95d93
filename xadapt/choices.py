"""What may be chosen, in words: the command line's help shows it, and must not wait for torch."""

from __future__ import annotations

LAYOUTS = ("peft", "diffusers", "kohya")
DTYPES = ("float32", "bfloat16", "float16", "float64")
"""What a LoRA is written in; stock loaders read no smaller floats."""

NAMES = {
    "diffusers": ("unet", "transformer", "text_encoder", "text_encoder_2"),
    "kohya": ("unet", "transformer", "text_encoder", "text_encoder_1", "text_encoder_2"),
}
"""The components that a layout has names for. kohya's "text_encoder_1" is the first of two, as in SDXL and FLUX."""

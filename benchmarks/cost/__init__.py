"""What a training step in feature space costs, beside PEFT's LoRA and beside the floor, in one run."""

"""What A4A costs at each denoising step, beside the native IP-Adapter and beside running both models, in one run."""

"""Products with 8-bit activations: W8A8, W4A8 and FP8."""

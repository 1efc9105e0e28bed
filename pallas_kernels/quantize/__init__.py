"""Blockwise encoders: weights or activations to codes and scales."""

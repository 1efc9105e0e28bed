"""Fused optimizer updates with 8-bit blockwise states."""

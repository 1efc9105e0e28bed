"""Decode attention over a quantized KV cache, and the write that quantizes."""

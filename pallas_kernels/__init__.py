"""Kernels: arrays in, arrays out.

One folder per operation; each has `reference.py` (plain jnp, the definition),
`tpu.py`, `gpu.py` (Mosaic GPU) and, where it pays, `cpu.py` (native code in `native/`).
`weights` says what packed arrays mean, `arguments` checks them, and `hopper` has the
pieces that GPU kernels share.
Nothing here imports qjax; `qjax.ops` chooses between the kernels.
"""

__all__: list[str] = []

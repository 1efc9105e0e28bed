"""gpt-oss checkpoints: experts in MXFP4.

`NAME_blocks` uint8 `[experts, out, in / 32, 16]`, 32 E2M1 codes in 16 bytes, the first
of two in the low nibble, and `NAME_scales` uint8 E8M0 `[experts, out, in / 32]`. `NAME`
is `gate_up_proj` or `down_proj`. The outputs of `gate_up_proj` alternate: gate, up,
gate, up; `gate_and_up` takes them apart. OpenAI's own files say `mlp1_weight.blocks`
and `mlp2_weight.blocks`.

Reference: gpt-oss `gpt_oss/torch/weights.py`; transformers `integrations/mxfp4.py`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.floats import fp4
from qjax.errors import FormatError
from qjax.tensor import MinifloatTensor


class GptOss:
    """Reads weights under one name; see `qjax.converters.gptq.GPTQ`.

    Rank 4 are the weights of experts, rank 3 those of one layer.
    """

    kind, marks = "mxfp4", ("blocks",)
    parts: Mapping[str, tuple[str, int | None]] = {
        "blocks": ("uint8", None),
        "scales": ("uint8", None),
    }
    stated = ()

    def __init__(self, settings: Mapping[str, Any], where: str):
        del settings, where  # the layout is always the same

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`, after the number of experts if there are several."""
        shape = parts["blocks"].shape
        if len(shape) not in (3, 4):
            raise ValueError(f"blocks {list(shape)}, expected rank 3 or 4")
        *lead, groups, size = shape
        return (*lead, groups * size * 2)

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> MinifloatTensor:
        """A weight `[in, out]` or `[experts, in, out]`."""
        return weights(parts["blocks"], parts["scales"], where)


def weights(blocks: np.ndarray, scales: np.ndarray, where: str) -> MinifloatTensor:
    """A weight `[*experts, in, out]`, outputs in the order of the file.

    Args:
      blocks: uint8 `[*experts, out, in / 32, 16]`.
      scales: uint8 `[*experts, out, in / 32]`.
      where: what errors call it.

    Raises:
      FormatError: shapes or dtypes do not fit.
    """
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != 16 or blocks.dtype != np.uint8:
        raise FormatError(
            f"{where}: blocks are {blocks.dtype} {list(blocks.shape)}, expected uint8 "
            "[experts, out, in / 32, 16]"
        )
    if scales.shape != blocks.shape[:-1]:
        raise FormatError(
            f"{where}: scales have shape {list(scales.shape)}, expected "
            f"{list(blocks.shape[:-1])} as the blocks"
        )
    packed = blocks.reshape(*blocks.shape[:-2], -1)
    return fp4(packed, scales, None, where)


def gate_and_up(
    blocks: np.ndarray, scales: np.ndarray, where: str
) -> tuple[MinifloatTensor, MinifloatTensor]:
    """The two weights that `gate_up_proj` interleaves; see `weights`.

    Returns:
      Gate (even outputs) and up (odd outputs), each `[*experts, in, out / 2]`.

    Raises:
      FormatError: shapes or dtypes do not fit, or there is an odd number of outputs.
    """
    if blocks.ndim < 3 or blocks.shape[-3] % 2 or scales.ndim < 2:
        raise FormatError(
            f"{where}: blocks {list(blocks.shape)} do not hold pairs of gate and up"
        )
    gate, up = (
        weights(blocks[..., i::2, :, :], scales[..., i::2, :], where) for i in (0, 1)
    )
    return gate, up

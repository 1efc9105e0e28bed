"""One decoder block, and a run of equal blocks under `jax.lax.scan`.

A `Block` is the unit that calibration streams: it needs only its own parameters and
the call's `Positions`. Blocks whose parameters agree in structure, format, shape and
dtype are stacked on a leading axis; one scan then runs them, so compile time does not
grow with depth.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.models.attention import Attention, LayerNumbers
from qjax.models.cache import FloatKV, LayerCache, Positions, QuantizedKV
from qjax.models.config import ModelConfig
from qjax.models.layers import MLP, Leaves, Norm, below
from qjax.nn.linear import PRODUCT
from qjax.tensor import QuantizedTensor
from qjax.wrappers import layer_of


class Block(nnx.Module):
    """Attention and MLP with their norms and residual sums.

    pre-norm:  h = x + attn(norm(x)); y = h + mlp(norm(h));
    post-norm: h = norm(x + attn(x)); y = norm(h + mlp(h));
    parallel:  y = x + attn(norm(x)) + mlp(norm'(x)).
    Gemma also normalizes what attn and mlp return.

    Args:
        config: The model's configuration.
        leaves: The block's parameters by relative path (`"attn.q.kernel"`), arrays or
            quantized tensors, with a leading layer axis if stacked.
    """

    def __init__(self, config: ModelConfig, leaves: Leaves):
        self.config = config
        self.attn_norm = Norm(below(leaves, "attn_norm"), config)
        self.attn = Attention(below(leaves, "attn"), config)
        self.mlp_norm = Norm(below(leaves, "mlp_norm"), config)
        self.mlp = MLP(below(leaves, "mlp"), config)
        extra = config.post_norms
        self.attn_post_norm = (
            Norm(below(leaves, "attn_post_norm"), config) if extra else None
        )
        self.mlp_post_norm = (
            Norm(below(leaves, "mlp_post_norm"), config) if extra else None
        )

    def __call__(
        self,
        x: Float[Array, "batch time dim"],
        positions: Positions,
        numbers: LayerNumbers | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "batch time dim"], LayerCache | None]:
        """Runs the block on one layer's (unstacked) parameters.

        Args:
            x: The residual stream.
            positions: What all layers share; see `Decoder.positions`.
            numbers: This layer's window, rotary table and scale, where they vary.
            cache: This layer's cache.

        Returns:
            The residual stream after the block and the updated cache.
        """
        numbers = numbers or LayerNumbers()
        if self.config.norm_after:
            mixed, cache = self.attn(x, positions, numbers, cache)
            x = self.attn_norm(x + mixed)
            return self.mlp_norm(x + self.mlp(x)), cache
        mixed, cache = self.attn(self.attn_norm(x), positions, numbers, cache)
        if self.config.parallel_residual:
            return x + mixed + self.mlp(self.mlp_norm(x)), cache
        if self.attn_post_norm is not None:
            mixed = self.attn_post_norm(mixed)
        x = x + mixed
        hidden = self.mlp(self.mlp_norm(x))
        if self.mlp_post_norm is not None:
            hidden = self.mlp_post_norm(hidden)
        return x + hidden, cache


def run_blocks(
    blocks: Block,
    x: Float[Array, "batch time dim"],
    positions: Positions,
    numbers: LayerNumbers,
    cache: FloatKV | QuantizedKV | None = None,
    remat: str = "none",
    view: Any = None,
) -> tuple[Float[Array, "batch time dim"], FloatKV | QuantizedKV | None]:
    """Runs a stack of blocks one after the other in a single scan.

    Args:
        blocks: A block whose every leaf has a leading layer axis.
        x: The residual stream.
        positions: What all layers share.
        numbers: Per-layer numbers with the same leading axis.
        cache: Keys and values of the run, carried and updated in place.
        remat: What a gradient finds stored, see `REMAT`.
        view: A layer's block to the one that runs in its place.

    Returns:
        The residual stream and the updated keys and values.
    """
    graph, state = nnx.split(blocks)
    count = jax.tree.leaves(state)[0].shape[0]
    # Packed weights are not sliced by the scan: kernels read the layer in its stack.
    leaves, tree = jax.tree.flatten(state, is_leaf=is_packed)
    dense = [None if is_packed(leaf) else leaf for leaf in leaves]

    def step(carry: Any, item: Any) -> tuple[Any, None]:
        x, stored = carry
        x = checkpoint_name(x, "stream")
        dense, numbers, layer = item
        one = [
            layer_of(leaf, layer) if cut is None else cut
            for leaf, cut in zip(leaves, dense, strict=True)
        ]
        own = None if stored is None else LayerCache(stored, layer)
        block = nnx.merge(graph, jax.tree.unflatten(tree, one))
        block = block if view is None else view(block)
        x, own = block(x, positions, numbers, own)
        return (x, None if own is None else own.stored), None

    layers = jnp.arange(count, dtype=jnp.int32)
    step = stored_by(remat, step)
    (x, cache), _ = jax.lax.scan(step, (x, cache), (dense, numbers, layers))
    return x, cache


REMAT = ("none", "products", "block", "offload")
"""What a gradient finds stored: everything; results of products, the rest is computed
again; each block's input alone; or that input in the host's memory, fetched when its
block is due."""


def stored_by(remat: str, step: Any) -> Any:
    """Returns the body of a scan over blocks whose gradient stores what `remat` says.

    Raises:
        SpecError: `remat` is not one of `REMAT`.
    """
    if remat not in REMAT:
        raise SpecError(f"remat={remat!r}; expected one of {REMAT}")
    if remat == "none":
        return step
    policy = None
    if remat == "products":
        policy = jax.checkpoint_policies.save_only_these_names(PRODUCT)
    if remat == "offload":
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["stream"],
            offload_src="device",
            offload_dst="pinned_host",
        )
    return jax.checkpoint(step, policy=policy, prevent_cse=False)


def is_packed(leaf: Any) -> bool:
    """Whether a leaf of a parameter tree is a packed weight."""
    return isinstance(leaf, QuantizedTensor)

"""The one decoder: every supported architecture is a `ModelConfig` and this module.

Decides how a flat dict of parameters becomes a running model: consecutive layers whose
parameters agree in structure, format, shape and dtype form a run, stacked on a leading
axis and scanned. A uniform model is one run, so it compiles as fast as one layer.

Refuses parameter dicts that do not fit the configuration, naming every path. Costs:
building stacks copies each layer's parameters once; logits are float32.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from qjax.errors import SpecError
from qjax.models.attention import LayerNumbers, layer_numbers
from qjax.models.block import Block, run_blocks
from qjax.models.cache import KVCache, Positions, empty_kv
from qjax.models.config import ModelConfig
from qjax.models.layers import Embedding, Norm, below, leaves_of, linear, wide_matmul
from qjax.models.rope import rope_angles
from qjax.models.stacks import Stacks
from qjax.models.weights import HEAD, param_shapes
from qjax.nn.lora import LoRALinear
from qjax.ops import canonical


class Decoder(nnx.Module):
    """A decoder-only language model over dense or quantized parameters.

    Args:
        config: The architecture.
        params: Parameters by path, arrays or quantized tensors; `head.kernel` may be
            absent if the configuration ties it to the embedding. `Stacks` where they
            were put in place layer by layer.
        dtype: Compute dtype; float32 on CPU and bfloat16 elsewhere by default. Dense
            parameters keep the dtype they come in.

    Raises:
        SpecError: Parameters are missing, unknown or of the wrong shape.

    Example:
        >>> model = Decoder(config, params)
        >>> logits, _ = model(tokens)
        >>> cache = model.init_cache(batch=1, length=64)
        >>> logits, cache = model(prompt, cache)
        >>> logits, cache = model(logits[:, -1:].argmax(-1), cache)
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Any] | Stacks,
        *,
        dtype: Any = None,
    ):
        stacks = params
        if not isinstance(stacks, Stacks):
            _check(config, {path: leaf.shape for path, leaf in stacks.items()})
            stacks = Stacks.of(config.layers, stacks)
        stacks.close()
        _check(config, stacks.shapes)
        on_cpu = jax.default_backend() == "cpu"
        self.config = config
        self.assets: Any = None  # set by qjax.load: what to copy when saving
        self.report: Any = None  # set by qjax.quantize_model
        self.dtype = np.dtype(dtype or (jnp.float32 if on_cpu else jnp.bfloat16))
        outer = stacks.outer
        self.embed = Embedding(_placed(outer, "embed"), config, self.dtype)
        self.runs = tuple(stacks.runs)
        self.layers = nnx.List(Block(config, run) for run in stacks.stacked)
        self.norm = Norm(_placed(outer, "norm"), config) if config.final_norm else None
        self.head = linear(_placed(outer, "head")) if HEAD in outer else None

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        cache: KVCache | None = None,
        *,
        positions: Int[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time vocab"], KVCache | None]:
        """Returns the logits after every token.

        Args:
            tokens: Token ids.
            cache: Cache to continue; its next slots are overwritten. The caller keeps
                `cache.index + time <= cache.length`.
            positions: Position of every token in its row, -1 for padding; by default
                the tokens continue each row. See `positions_from_mask`.

        Returns:
            Float32 logits (those of padding are meaningless) and the updated cache.

        Raises:
            SpecError: More tokens than cache slots or learned positions.
        """
        x, cache = self.hidden(tokens, cache, positions=positions)
        return self.logits(x), cache

    def hidden(
        self,
        tokens: Int[Array, "batch time"],
        cache: KVCache | None = None,
        *,
        positions: Int[Array, "batch time"] | None = None,
        segments: Int[Array, "batch time"] | None = None,
        remat: str = "none",
        view: Any = None,
    ) -> tuple[Float[Array, "batch time dim"], KVCache | None]:
        """Returns what `logits` takes: the stream after the last norm; and the cache.

        Prefill uses it to compute logits of the last token only, training to compute
        those of a few tokens at a time.

        Args:
            tokens: Token ids.
            cache: See `__call__`.
            positions: See `__call__`.
            segments: Number of the sample that each token belongs to, where rows hold
                several that must not see each other.
            remat: What a gradient finds stored, one of `qjax.models.block.REMAT`.
            view: `(run, block)` to the block that runs in its place, inside the scan
                over layers; see `qjax.train.parallel`.

        Raises:
            SpecError: As `__call__`; segments with a cache; an unknown `remat`.
        """
        where = self.positions(tokens, cache, positions)
        if segments is not None:
            if cache is not None:
                raise SpecError("segments are for calls without a cache; leave one out")
            where = dataclasses.replace(where, segments=segments)
        x = self.embed(tokens, where.queries)
        stores = []
        for run, (blocks, (start, stop)) in enumerate(
            zip(self.layers, self.runs, strict=True)
        ):
            stored = None if cache is None else cache.runs[run]
            numbers = layer_numbers(self.config, start, stop)
            own = None if view is None else functools.partial(view, run)
            x, stored = run_blocks(blocks, x, where, numbers, stored, remat, own)
            if stored is not None:
                stores.append(stored)
        if cache is not None:
            index = cache.index + tokens.shape[1]
            cache = KVCache(tuple(stores), where.keys, index)
        return (x if self.norm is None else self.norm(x)), cache

    def logits(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocab"]:
        """Returns float32 logits of hidden states."""
        head = self.head
        y = self.embed.attend(x) if head is None else wide_matmul(x, head.weight())
        if isinstance(head, LoRALinear):
            y = head.adapted(x, y)
        cap = self.config.logit_softcap
        return y if cap is None else jnp.tanh(y / cap) * cap

    def positions(
        self,
        tokens: Int[Array, "batch time"],
        cache: KVCache | None = None,
        positions: Int[Array, "batch time"] | None = None,
    ) -> Positions:
        """Returns what all layers of a call share, to run blocks one by one."""
        time = tokens.shape[1]
        self._check_length(time, cache)
        if positions is None:
            first = 0 if cache is None else cache.next_positions[:, None]
            counted = jnp.arange(time, dtype=jnp.int32)[None] + first
            positions = jnp.broadcast_to(counted, tokens.shape)
        positions = jnp.asarray(positions, jnp.int32)
        keys, index = positions, jnp.zeros((), jnp.int32)
        if cache is not None:
            index = cache.index
            keys = jax.lax.dynamic_update_slice(
                cache.positions, positions, (jnp.zeros((), jnp.int32), index)
            )
        return positions_of(self.config, positions, keys, index)

    def init_cache(
        self, batch: int, length: int, dtype: Any = None, *, rotate: str = "none"
    ) -> KVCache:
        """Returns an empty cache of `length` slots per row.

        Args:
            batch: Number of rows.
            length: Number of tokens each row can hold, padding included.
            dtype: Float dtype of keys and values, the compute dtype by default; or
                `"int8"`, `"fp8"` (`"float8_e4m3fn"`) or `"int4"` to store codes with
                a scale per token and head.
            rotate: Mix `"keys"` or `"both"` keys and values of a quantized cache with a
                Hadamard matrix before rounding, which spreads outliers.

        Raises:
            SpecError: The length is not positive, or exceeds learned positions; the
                dtype is unknown; nothing to rotate.
        """
        if length < 1:
            raise SpecError(f"cache length is {length}; expected at least 1")
        self._check_length(length, None)
        config = self.config
        shape = (batch, config.kv_heads, length, config.head_dim)

        kind = self.dtype if dtype is None else dtype
        runs = tuple(empty_kv((b - a, *shape), kind, rotate) for a, b in self.runs)
        unwritten = jnp.full((batch, length), -1, jnp.int32)
        return KVCache(runs, unwritten, jnp.zeros((), jnp.int32))

    def blocks(self) -> Iterator[tuple[int, Block, LayerNumbers]]:
        """Yields every layer's index, its own unstacked block, and its numbers."""
        for blocks, (start, stop) in zip(self.layers, self.runs, strict=True):
            graph, state = nnx.split(blocks)
            numbers = layer_numbers(self.config, start, stop)
            for i in range(stop - start):
                one = jax.tree.map(lambda leaf, i=i: leaf[i], (state, numbers))
                yield start + i, nnx.merge(graph, one[0]), one[1]

    def parts(self) -> Iterator[tuple[int | None, dict[str, Any]]]:
        """Yields parameters by path, unstacked: embeddings, each layer, norm and head.

        The layer index is None for the first and the last part. Weights come in the
        layout at rest, also when the model is prepacked.
        """
        tables = canonical(self.embed.leaves())
        yield None, {f"embed.{path}": leaf for path, leaf in tables.items()}
        for layer, block, _ in self.blocks():
            start = f"layers.{layer}."
            leaves = canonical(leaves_of(block))
            yield layer, {start + path: leaf for path, leaf in leaves.items()}
        last: dict[str, Any] = {}
        for name, module in (("norm", self.norm), ("head", self.head)):
            found = {} if module is None else canonical(leaves_of(module))
            last |= {f"{name}.{path}": leaf for path, leaf in found.items()}
        yield None, last

    def params(self) -> dict[str, Any]:
        """Returns the parameters by path, unstacked; inverse of construction."""
        return {path: leaf for _, part in self.parts() for path, leaf in part.items()}

    def _check_length(self, time: int, cache: KVCache | None) -> None:
        if cache is not None and time > cache.length:
            raise SpecError(
                f"{time} tokens do not fit a cache of {cache.length} slots; make a "
                "longer cache or pass fewer tokens"
            )
        learned = not self.config.ropes
        if learned and time > self.config.max_context:
            raise SpecError(
                f"{time} positions exceed this model's {self.config.max_context} "
                "learned positions; use a shorter context"
            )


def positions_of(
    config: ModelConfig,
    positions: Int[Array, "batch time"],
    keys: Int[Array, "batch length"],
    index: Int[Array, ""],
) -> Positions:
    """Returns what all layers of a call share, with its rotary tables."""
    tables = [rope_angles(rope, positions) for rope in config.ropes]
    cos = jnp.stack([table[0] for table in tables]) if tables else None
    sin = jnp.stack([table[1] for table in tables]) if tables else None
    return Positions(positions, keys, cos, sin, index)


def _placed(params: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Returns the leaves under a prefix as device arrays."""
    return jax.tree.map(jnp.asarray, below(params, prefix))


def _check(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises unless `shapes` are those of the parameters that `config` describes."""
    expected = param_shapes(config)
    optional = {HEAD: (config.dim, config.vocab_size)} if config.tied else {}
    allowed = {**expected, **optional}
    faults = [f"{path} is missing" for path in expected if path not in shapes]
    faults += [f"{path} is unknown" for path in shapes if path not in allowed]
    faults += [
        f"{path} has shape {tuple(shape)}, expected {allowed[path]}"
        for path, shape in shapes.items()
        if path in allowed and tuple(shape) != allowed[path]
    ]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise SpecError(
            f"parameters do not fit the {config.family} configuration: "
            f"{'; '.join(faults[:5])}{more}"
        )

"""Which tensors a Hugging Face checkpoint holds, and the parameters in them.

Decides, for every supported family, names and exact shapes, and how each tensor becomes
one or several parameters; every step is invertible. Transforms are views where NumPy
allows, so a memory-mapped file is read once.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.models.columns import columns, joined
from qjax.models.config import ModelConfig
from qjax.models.layouts import LAYOUTS, Kind
from qjax.tensor import QuantizedTensor
from qjax.wrappers import Transposed

HEAD = "head.kernel"
EMBEDDING = "embed.embedding"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One checkpoint tensor and the parameters it holds.

    Attributes:
        name: Name of the tensor in a Hugging Face checkpoint.
        shape: Its shape there.
        paths: Parameters it holds.
        shapes: Their shapes.
        layer: Layer it belongs to; None for embeddings, the last norm and the head.
        kind: How parameters lie in the tensor.
        heads: Number of heads, for interleaved ones.
        optional: May be absent (the head of a model with tied embeddings).
        aliases: Other names of the same tensor.
    """

    name: str
    shape: tuple[int, ...]
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    layer: int | None
    kind: Kind
    heads: int = 1
    optional: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def embedding(self) -> bool:
        """Whether it is the table of embeddings, `[vocab, dim]`."""
        return self.paths == (EMBEDDING,)

    def read(self, tensor: Any) -> dict[str, Any]:
        """Returns the parameters that `tensor` holds, by path.

        A quantized tensor is in the order of kernels, `[in, out]`, already.
        """
        if isinstance(tensor, QuantizedTensor):
            return self._read_packed(tensor)
        whole = tensor.T if self.kind.transposed else tensor
        if len(self.paths) == 1:
            return {self.paths[0]: whole}
        return self._split(whole)

    def _read_packed(self, tensor: QuantizedTensor) -> dict[str, Any]:
        if self.embedding:
            return {EMBEDDING: Transposed(tensor)}
        if len(self.paths) == 1:
            return {self.paths[0]: tensor}
        numbers = np.arange(tensor.matrix[1])
        made = {}
        for path, index in self._split(numbers).items():
            run = np.array_equal(index, np.arange(index[0], index[0] + len(index)))
            piece = slice(int(index[0]), int(index[0]) + len(index)) if run else index
            made[path] = columns(tensor, piece)
        return made

    def _split(self, whole: np.ndarray) -> dict[str, np.ndarray]:
        """The parameters whose last axes lie in that of `whole`."""
        if self.kind.interleaved:
            count = len(self.paths)
            cut = whole.reshape(*whole.shape[:-1], self.heads, count, -1)
            pieces = [
                cut[..., i, :].reshape(*whole.shape[:-1], shape[-1])
                for i, shape in enumerate(self.shapes)
            ]
        else:
            ends = np.cumsum([shape[-1] for shape in self.shapes])[:-1]
            pieces = np.split(whole, ends, axis=-1)
        return dict(zip(self.paths, pieces, strict=True))

    def write_packed(self, params: Mapping[str, Any]) -> QuantizedTensor:
        """Returns the quantized tensor `[in, out]` made of the parameters.

        Raises:
          UnsupportedError: the parameters are not quantized alike.
        """
        pieces = [params[path] for path in self.paths]
        if len(pieces) == 1:
            q = pieces[0]
            return q.base if self.embedding and isinstance(q, Transposed) else q
        whole = joined(pieces)
        ends = np.cumsum([0, *(q.matrix[1] for q in pieces)])
        places = {
            path: np.arange(a, b)
            for path, a, b in zip(self.paths, ends, ends[1:], strict=False)
        }
        return columns(whole, self._merged(places)) if self.kind.interleaved else whole

    def write(self, params: Mapping[str, Any]) -> np.ndarray:
        """Returns the checkpoint tensor made of the parameters; inverse of `read`."""
        whole = self._merged(params)
        return np.ascontiguousarray(whole.T if self.kind.transposed else whole)

    def _merged(self, params: Mapping[str, Any]) -> np.ndarray:
        """Inverse of `_split`."""
        pieces = [np.asarray(params[path]) for path in self.paths]
        if self.kind.interleaved:
            apart = [p.reshape(*p.shape[:-1], self.heads, -1) for p in pieces]
            return np.stack(apart, axis=-2).reshape(*pieces[0].shape[:-1], -1)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-1)


def plan(config: ModelConfig) -> tuple[Entry, ...]:
    """Returns every tensor of a checkpoint: embeddings, layers in order, norm, head."""
    layout = LAYOUTS[config.family]
    sizes = _sizes(config)

    def entry(
        prefix: str, item: tuple[str, Kind, tuple[str, ...]], layer: int | None
    ) -> Entry:
        name, kind, paths = item
        shapes = tuple(sizes[path] for path in paths)
        whole = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
        start = "" if layer is None else f"layers.{layer}."
        return Entry(
            name=prefix + name,
            shape=whole[::-1] if kind.transposed else whole,
            paths=tuple(start + path for path in paths),
            shapes=shapes,
            layer=layer,
            kind=kind,
            heads=config.heads,
        )

    def wanted(items: Sequence[tuple[str, Kind, tuple[str, ...]]]):
        return [item for item in items if item[2][0] in sizes]

    first = [entry(layout.base, item, None) for item in wanted(layout.embed)]
    middle = [
        entry(f"{layout.base}{layout.layers}.{i}.", item, i)
        for i in range(config.layers)
        for item in wanted(layout.layer)
    ]
    last = [entry(layout.base, item, None) for item in wanted(layout.norm)]
    head = entry("", (layout.head[0], Kind(True), (HEAD,)), None)
    head = dataclasses.replace(head, optional=config.tied, aliases=layout.head[1:])
    return (*first, *middle, *last, head)


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter by path; without a head if tied."""
    return {
        path: shape
        for entry in plan(config)
        if not entry.optional
        for path, shape in zip(entry.paths, entry.shapes, strict=True)
    }


def _sizes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns shapes by path relative to the layer (or to the model)."""
    dim, q, kv, mlp = config.dim, config.q_dim, config.kv_dim, config.mlp_dim
    sizes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, dim),
        HEAD: (dim, config.vocab_size),
    }
    if not config.ropes:
        rows = config.max_context + config.position_offset
        sizes["embed.position"] = (rows, dim)
    matrices = {
        "attn.q": (dim, q, config.qkv_bias),
        "attn.k": (dim, kv, config.qkv_bias),
        "attn.v": (dim, kv, config.qkv_bias),
        "attn.o": (q, dim, config.out_bias),
        "mlp.up": (dim, mlp, config.mlp_bias),
        "mlp.down": (mlp, dim, config.mlp_bias),
    }
    if config.gated:
        matrices["mlp.gate"] = (dim, mlp, config.mlp_bias)
    for path, (rows, cols, bias) in matrices.items():
        sizes[f"{path}.kernel"] = (rows, cols)
        if bias:
            sizes[f"{path}.bias"] = (cols,)
    norms = ["attn_norm", "mlp_norm"] + ["norm"] * config.final_norm
    norms += ["attn_post_norm", "mlp_post_norm"] * config.post_norms
    for path in norms if config.norm_affine else []:
        sizes[f"{path}.scale"] = (dim,)
        if config.norm == "layer":
            sizes[f"{path}.bias"] = (dim,)
    if config.qk_norm:
        sizes["attn.q_norm.scale"] = sizes["attn.k_norm.scale"] = (config.head_dim,)
    return sizes

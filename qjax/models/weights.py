"""Hugging Face tensor names and layouts against qjax's parameter paths.

Decides, for every supported family, which tensors a checkpoint must hold, with exact
shapes, and how each becomes one or several parameters; every step is invertible.
Transforms are views where NumPy allows, so a memory-mapped file is read once.

Accepts the prefixes with which checkpoints of bare base models are saved, ignores the
constant buffers old versions stored, and follows transformers on tied heads: a stored
head equal to the embedding is dropped, a different one is kept, with a warning.
"""

import dataclasses
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.errors import FormatError, SpecError
from qjax.models.config import ModelConfig
from qjax.models.layouts import LAYOUTS, Kind

_log = logging.getLogger(__name__)

_BUFFERS = re.compile(
    r"(^|\.)rotary_emb\.inv_freq$|(^|\.)(attn|attention)\.(masked_)?bias$"
)
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

    def read(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the parameters that `tensor` holds, by path."""
        whole = tensor.T if self.kind.transposed else tensor
        if len(self.paths) == 1:
            return {self.paths[0]: whole}
        if self.kind.interleaved:
            count = len(self.paths)
            cut = whole.reshape(*whole.shape[:-1], self.heads, count, -1)
            pieces = [
                cut[..., i, :].reshape(shape) for i, shape in enumerate(self.shapes)
            ]
        else:
            ends = np.cumsum([shape[-1] for shape in self.shapes])[:-1]
            pieces = np.split(whole, ends, axis=-1)
        return dict(zip(self.paths, pieces, strict=True))

    def write(self, params: Mapping[str, Any]) -> np.ndarray:
        """Returns the checkpoint tensor made of the parameters; inverse of `read`."""
        pieces = [np.asarray(params[path]) for path in self.paths]
        if self.kind.interleaved:
            apart = [p.reshape(*p.shape[:-1], self.heads, -1) for p in pieces]
            whole = np.stack(apart, axis=-2).reshape(*pieces[0].shape[:-1], -1)
        else:
            whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-1)
        return np.ascontiguousarray(whole.T if self.kind.transposed else whole)


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
    for path, (rows, columns, bias) in matrices.items():
        sizes[f"{path}.kernel"] = (rows, columns)
        if bias:
            sizes[f"{path}.bias"] = (columns,)
    norms = ["attn_norm", "mlp_norm"] + ["norm"] * config.final_norm
    norms += ["attn_post_norm", "mlp_post_norm"] * config.post_norms
    for path in norms if config.norm_affine else []:
        sizes[f"{path}.scale"] = (dim,)
        if config.norm == "layer":
            sizes[f"{path}.bias"] = (dim,)
    if config.qk_norm:
        sizes["attn.q_norm.scale"] = sizes["attn.k_norm.scale"] = (config.head_dim,)
    return sizes


@dataclasses.dataclass(frozen=True)
class Match:
    """How the tensors of one checkpoint meet the plan.

    Attributes:
        names: Name in the checkpoint of every planned tensor found.
        missing: Planned tensors that are absent.
        unexpected: Tensors that nothing uses.
        ignored: Constant buffers, which carry no weights.
        wrong: `(name, shape, expected shape)` of ill-shaped tensors.
    """

    names: dict[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    ignored: tuple[str, ...]
    wrong: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    def check(self, where: str = "checkpoint") -> None:
        """Raises one error that lists everything which does not fit.

        Raises:
            FormatError: Tensors are missing, unexpected or of the wrong shape.
        """
        faults = []
        if self.missing:
            faults.append(f"{len(self.missing)} missing ({_some(self.missing)})")
        if self.unexpected:
            count = len(self.unexpected)
            faults.append(f"{count} unexpected ({_some(self.unexpected)})")
        if self.wrong:
            shown = [f"{n}: got {g}, expected {e}" for n, g, e in self.wrong]
            faults.append(f"{len(shown)} of the wrong shape ({_some(shown)})")
        if faults:
            raise FormatError(
                f"{where}: tensors do not fit config.json: {'; '.join(faults)}. "
                "Check that weights and config.json belong to the same model"
            )


def _some(names: Sequence[str]) -> str:
    rest = len(names) - 5
    return ", ".join(names[:5]) + (f", and {rest} more" if rest > 0 else "")


def match(config: ModelConfig, shapes: Mapping[str, Sequence[int]]) -> Match:
    """Finds the planned tensors among those of a checkpoint.

    Args:
        config: The model.
        shapes: Shape of every tensor in the checkpoint, by name.

    Returns:
        What was found and what was not; nothing is raised here.
    """
    entries, layout = plan(config), LAYOUTS[config.family]
    base = _base(layout.base, layout.bases, entries[0], shapes)
    names: dict[str, str] = {}
    for entry in entries:
        own = [entry.name]
        if base is not None and entry.name.startswith(layout.base):
            own = [base + entry.name[len(layout.base) :]]
        found = [n for n in (*own, *entry.aliases) if n in shapes]
        if found:
            names[entry.name] = found[0]
    if config.tied and entries[0].name not in names and entries[-1].name in names:
        names[entries[0].name] = names.pop(entries[-1].name)
    missing = [e.name for e in entries if e.name not in names and not e.optional]
    used = set(names.values())
    ignored = [n for n in shapes if n not in used and _BUFFERS.search(n)]
    wrong = [
        (names[e.name], tuple(shapes[names[e.name]]), e.shape)
        for e in entries
        if e.name in names and tuple(shapes[names[e.name]]) != e.shape
    ]
    rest = [n for n in shapes if n not in used and n not in ignored]
    return Match(names, tuple(missing), tuple(rest), tuple(ignored), tuple(wrong))


def _base(
    usual: str, others: Sequence[str], embedding: Entry, names: Mapping[str, Any]
) -> str | None:
    """Returns the prefix under which this checkpoint keeps the base model."""
    tail = embedding.name[len(usual) :]
    return next((b for b in (usual, *others) if b + tail in names), None)


def read_parts(
    config: ModelConfig, found: Match, fetch: Callable[[str], np.ndarray]
) -> Iterator[tuple[int | None, dict[str, np.ndarray]]]:
    """Yields parameters part by part: embeddings, each layer, then norm and head.

    Args:
        config: The model.
        found: The result of `match`, checked.
        fetch: Returns the tensor of a name in the checkpoint; called once per tensor,
            and once more for the embedding if a tied head is stored.

    Yields:
        The layer (None for the first and last part) and its parameters by path.
    """
    part: dict[str, np.ndarray] = {}
    previous: int | None = None
    for entry in plan(config):
        if entry.layer != previous:
            yield previous, part
            part, previous = {}, entry.layer
        if entry.name in found.names:
            part.update(entry.read(fetch(found.names[entry.name])))
    if config.tied and HEAD in part:
        embedding = fetch(found.names[plan(config)[0].name])
        if np.array_equal(part[HEAD].T, embedding):
            del part[HEAD]
        else:
            _log.warning(
                "config.json ties the head to the embedding, but the checkpoint holds "
                "a different head; keeping it"
            )
    yield previous, part


def from_hf(
    config: ModelConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Turns all tensors of a checkpoint into parameters by path.

    Raises:
        FormatError: Tensors are missing, unexpected or of the wrong shape.
    """
    found = match(config, {name: tensor.shape for name, tensor in tensors.items()})
    found.check()
    params: dict[str, np.ndarray] = {}
    for _, part in read_parts(config, found, tensors.__getitem__):
        params.update(part)
    return params


def to_hf(
    config: ModelConfig, params: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields name and tensor of a Hugging Face checkpoint, one at a time.

    Args:
        config: The model.
        params: Dense parameters by path.

    Raises:
        SpecError: A parameter is absent.
    """
    for entry in plan(config):
        absent = [path for path in entry.paths if path not in params]
        if absent and entry.optional:
            continue
        if absent:
            raise SpecError(f"parameters lack {_some(absent)}, needed by {entry.name}")
        yield entry.name, entry.write(params)

"""Adapters by path of a model's weights, as training has them, to and from PEFT's.

A tree has a dict for every adapted weight (`layers.3.attn.q`, `embed`, `head`):
`a [in / pool, rank]`, `b [rank, out]`, with DoRA `magnitude [out]`, and the numbers
`rank`, `alpha` and `scale`, where `y = base(x) + scale * mean_pool(x) a b`. With pooled
inputs (QA-LoRA) `scale` has the number of averages in it, `alpha` has not.

Where a checkpoint keeps several weights in one tensor (`qkv_proj`), PEFT has one
adapter for all of them. Those that share their `a`, as they come out of such a file, go
back as they came. Others stand side by side: `a = [a_q a_k a_v]`, `b` is block-diagonal
and the rank is the sum, which is the same product.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.converters.adapters import by_path
from qjax.converters.peft_forms import plain, short, with_settings
from qjax.converters.peft_settings import Adapter, Factors
from qjax.errors import NonFiniteError, SpecError, UnsupportedError
from qjax.models import Entry, ModelConfig, plan

Tree = Mapping[str, Mapping[str, Any]]


def tree_of(config: ModelConfig, adapter: Adapter) -> dict[str, dict[str, Any]]:
    """The tree of an adapter that was read.

    Args:
      config: the base model.
      adapter: from `qjax.converters.peft.read_adapter`; its whole tensors (`saved` and
        `base`) have no place in a tree.

    Raises:
      FormatError: the adapter has layers that the model does not, or other shapes.
    """
    tree = {}
    for path, own in by_path(config, adapter)[0].items():
        root = math.sqrt(own.rank) if adapter.use_rslora else own.rank
        tree[module_of(path)] = {
            "a": np.ascontiguousarray(own.a),
            "b": np.ascontiguousarray(own.b),
            "rank": own.rank,
            "alpha": short(own.scaling * root / own.averages),
            "scale": own.scaling,
        }
        if own.magnitude is not None:
            tree[module_of(path)]["magnitude"] = np.asarray(own.magnitude)
    return tree


def adapter_of_tree(
    config: ModelConfig, tree: Tree, *, base_model: str | None = None
) -> Adapter:
    """The adapter of a tree, to be written.

    Args:
      config: the base model.
      tree: see the module's header.
      base_model: name or directory of the base model, for the file.

    Raises:
      SpecError: the tree is empty, or does not fit the model.
      NonFiniteError: it holds NaN or infinity.
      UnsupportedError: DoRA over a part of a tensor that PEFT adapts as one.
    """
    entries = _layers(config)
    known = {module_of(path) for entry in entries for path in entry.paths}
    if unknown := sorted(tree.keys() - known):
        raise SpecError(
            f"adapter: {len(unknown)} of {len(tree)} are for weights that this "
            f"{config.family} model does not have, for example {unknown[0]!r:.200}"
        )
    if not tree:
        raise SpecError("adapter: there are no adapted layers to write")
    layers: dict[str, Factors] = {}
    linear = []
    for entry in entries:
        members = [_member(tree, entry, i) for i in range(len(entry.paths))]
        if any(own is not None for own in members):
            layers[entry.name.removesuffix(".weight")] = _joined(entry, members)
            linear += [entry] if not entry.paths[0].startswith("embed.") else []
    made = Adapter(
        layers,
        use_dora=any("magnitude" in own for own in tree.values()),
        fan_in_fan_out=any(not entry.kind.transposed for entry in linear),
        target_modules=_targets(entries, layers),
        base_model=base_model,
    )
    pools = {own.pool for own in layers.values()}
    made = dataclasses.replace(made, pool=max(pools))
    if len(pools) > 1:
        return with_settings(plain(made), False)
    return with_settings(made, made.pool == 1 and _root_scaled(tree.values()))


def module_of(path: str) -> str:
    """Name in a tree of a weight's path."""
    return path.removesuffix(".kernel").removesuffix(".embedding")


def _layers(config: ModelConfig) -> list[Entry]:
    """Tensors that are the weights of layers which PEFT adapts."""
    return [e for e in plan(config) if len(e.shape) == 2 and e.name.endswith(".weight")]


def _member(tree: Tree, entry: Entry, index: int) -> Factors | None:
    """One adapted weight, checked; None if it has no adapter."""
    name = module_of(entry.paths[index])
    own = tree.get(name)
    if own is None:
        return None
    rows, cols = entry.shapes[index]
    a, b, rank = np.asarray(own["a"]), np.asarray(own["b"]), own["rank"]
    pooled = a.shape[0] if a.ndim == 2 else 0
    if (
        not pooled
        or rows % pooled
        or a.shape != (pooled, rank)
        or b.shape != (rank, cols)
    ):
        raise SpecError(
            f"adapter: {name} has a {list(a.shape)} and b {list(b.shape)}; expected "
            f"[{rows}, {rank}] and [{rank}, {cols}]"
        )
    magnitude = own.get("magnitude")
    arrays = {"a": a, "b": b}
    if magnitude is not None:
        arrays["magnitude"] = magnitude = np.asarray(magnitude)
    for part, array in arrays.items():
        if bad := int(np.sum(~np.isfinite(array.astype(np.float32)))):
            raise NonFiniteError(
                f"adapter: {part} of {name} has {bad} values that are NaN or infinite"
            )
    embedding = name.startswith("embed")
    made = Factors(a, b, float(own["scale"]), magnitude, embedding, rows // pooled)
    for root in (rank, math.sqrt(rank)):  # the float64 of it
        stated = float(own["alpha"]) / root * made.averages
        if math.isclose(stated, made.scaling, rel_tol=1e-6):
            return dataclasses.replace(made, scaling=stated)
    return made


def _joined(entry: Entry, members: Sequence[Factors | None]) -> Factors:
    """The adapter of a tensor that holds several weights."""
    present = [own for own in members if own is not None]
    first = present[0]
    if len(entry.paths) == 1:
        return first
    name = entry.name.removesuffix(".weight")
    dora = any(own.magnitude is not None for own in present)
    if dora and not all(
        own is not None and own.magnitude is not None for own in members
    ):
        raise UnsupportedError(
            f"adapter: PEFT has one adapter for {name}, with magnitudes of all its "
            f"weights; with DoRA adapt all of {', '.join(map(module_of, entry.paths))}"
        )
    shared = len(present) == len(members) and all(
        np.array_equal(own.a, first.a) and own.scaling == first.scaling
        for own in present
    )
    if not shared:
        if len({own.pool for own in present}) > 1:
            members = [own and own.plain() for own in members]
        members, first = _side_by_side(entry, members)
        present = [own for own in members if own is not None]

    def whole(pieces: Iterable[Any]) -> np.ndarray:
        made = entry.write(dict(zip(entry.paths, pieces, strict=True)))
        return made.T if entry.kind.transposed else made

    magnitude = None
    if dora:
        magnitude = whole(own.magnitude[None] for own in present)[0]  # pyright: ignore[reportOptionalSubscript]
    b = whole(own.b for own in present)
    return dataclasses.replace(first, b=b, magnitude=magnitude)


def _side_by_side(
    entry: Entry, members: Sequence[Factors | None]
) -> tuple[list[Factors], Factors]:
    """Members over one `a`, the first's scale; those without an adapter add zero."""
    present = [own for own in members if own is not None]
    a = np.concatenate([own.a for own in present], axis=1)
    scaling = present[0].scaling
    made, start = [], 0
    for own, shape in zip(members, entry.shapes, strict=True):
        b = np.zeros((a.shape[1], shape[-1]), present[0].b.dtype)
        if own is not None:
            ratio = own.scaling / scaling
            part = own.b if ratio == 1 else own.b * own.b.dtype.type(ratio)
            b[start : start + own.rank] = part
            start += own.rank
        known = present[0] if own is None else own
        made.append(dataclasses.replace(known, a=a, b=b, scaling=scaling))
    return made, made[0]


def _root_scaled(members: Iterable[Mapping[str, Any]]) -> bool:
    """Whether scales are `alpha / sqrt(rank)`, and not `alpha / rank`."""
    known = [(own["alpha"], own["rank"], own["scale"]) for own in members]

    def all_are(power: float) -> bool:
        return all(
            math.isclose(alpha / rank**power, scale, rel_tol=1e-6)
            for alpha, rank, scale in known
        )

    return all_are(0.5) and not all_are(1.0)


def _targets(entries: Iterable[Entry], layers: Mapping[str, Any]) -> tuple[str, ...]:
    """The shortest ends of names that the adapted layers have and no others."""
    names = {entry.name.removesuffix(".weight") for entry in entries}
    others = {end for name in names - layers.keys() for end in _ends(name)}
    found = (next(end for end in _ends(name) if end not in others) for name in layers)
    return tuple(sorted(set(found)))


def _ends(name: str) -> list[str]:
    """`c`, `b.c` and `a.b.c` of `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]

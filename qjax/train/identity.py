"""What a run is, so that it is only continued as what it was.

Everything that changes the numbers is part of it: the frozen weights, what is trained
and how, the seed, and the number of steps where the schedule depends on it. What only
changes how they are computed (remat, chunks, devices, offloading, logging) is not, nor
is where files lie whose content is in the weights by then. Data, batch and tokenizer
are compared by `qjax.train.data_batches`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax.errors import SpecError
from qjax.train.config import Finetune
from qjax.train.from_json import plain


def identity_of(config: Finetune, steps: int, frozen: Any) -> dict[str, Any]:
    """Returns what a run is, as JSON.

    Args:
      config: Its settings.
      steps: Number of updates in all.
      frozen: What is not trained, a pytree of arrays.
    """
    optimizer = config.optimizer
    scheduled = optimizer.schedule != "constant" or 0 < optimizer.warmup < 1
    return {
        "base": digest_of(frozen),
        "lora": plain(config.lora),
        "qat": plain(config.qat),
        "optimizer": plain(optimizer),
        "seed": config.seed,
        "steps": steps if scheduled else None,
    }


def check_same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuses to continue a run as another.

    Args:
      ours: What is asked for, from `identity_of`.
      theirs: What the checkpoint belongs to.

    Raises:
      SpecError: They differ; the message names all settings that do.
    """
    ours = json.loads(json.dumps(ours))  # as it comes back from a file
    found = [d for d in _differences("", ours, theirs) if d[0] not in _PLACES]
    if len(found) > 1:  # other settings may be why the frozen weights differ
        found = [difference for difference in found if difference[0] != "base"]
    differ = [
        f"{path} is {a!r:.60}, the run has {b!r:.60}{_HINTS.get(path, '')}"
        for path, a, b in found
    ]
    if differ:
        raise SpecError(
            f"cannot resume: {'; '.join(differ)}; use what the run had, or start a new "
            "one in another directory"
        )


_PLACES = ("optimizer.offload", "lora.original", "qat.lora.original", "qat.calibration")
"""Settings that change no number."""
_HINTS = {
    "base": " (digests of the frozen weights: another model or another recipe)",
    "steps": " (the learning rate's schedule depends on it)",
}


def _differences(path: str, a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in dict.fromkeys([*a, *b]):
            inner = f"{path}.{name}" if path else name
            yield from _differences(inner, a.get(name), b.get(name))
    elif a != b:
        yield path, a, b


def digest_of(tree: Any) -> str:
    """Returns a digest of the bits of arrays, of which only sums leave the devices.

    It tells models and recipes apart; it is no protection against forgery.
    """
    found, _ = jax.tree_util.tree_flatten_with_path(tree)
    sums = _sums([x for _, x in found])
    parts = [
        [jax.tree_util.keystr(path), str(x.dtype), list(x.shape), int(total)]
        for (path, x), total in zip(found, sums, strict=True)
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    """Sums of the bits of arrays, modulo 2^32, in which every place counts its own."""

    def one(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if x.dtype == bool or x.dtype.name in ("int2", "int4", "uint2", "uint4"):
            x = x.astype(jnp.int8)
        kind = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
        bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
        for axis in range(bits.ndim):
            place = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            bits = bits * (2 * place + 1)  # odd, so that no bit is lost
        return jnp.sum(bits, dtype=jnp.uint32)

    return [one(x) for x in leaves]

"""What a training step takes: five arrays of one shape."""

from collections.abc import Mapping

from jaxtyping import Array

from qjax.errors import SpecError

Batch = Mapping[str, Array]
"""`tokens`, `targets`, `weights`, `positions` and `segments`, each `[accumulate, rows,
time]`; see `qjax.train.step.Step`."""

BATCH = ("tokens", "targets", "weights", "positions", "segments")


def checked(batch: Batch) -> dict[str, Array]:
    """Returns the arrays of a batch that a step takes.

    Raises:
      SpecError: One is missing, or shapes differ.
    """
    missing = [name for name in BATCH if name not in batch]
    if missing:
        raise SpecError(f"the batch lacks {', '.join(missing)}; it takes {BATCH}")
    shapes = {name: tuple(batch[name].shape) for name in BATCH}
    if len(set(shapes.values())) > 1 or len(shapes["tokens"]) != 3:
        raise SpecError(
            f"the batch has shapes {shapes}; expected one shape "
            "[accumulate, rows, time] of all"
        )
    return {name: batch[name] for name in BATCH}

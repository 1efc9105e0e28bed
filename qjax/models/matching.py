"""A checkpoint's tensors against the plan: finding, checking, reading, writing.

Accepts the prefixes with which checkpoints of bare base models are saved, ignores the
constant buffers old versions stored, and follows transformers on tied heads: a stored
head equal to the embedding is dropped, a different one is kept, with a warning.
Refuses anything else that does not fit, all of it in one message.
"""

import dataclasses
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.errors import FormatError, SpecError
from qjax.models.config import ModelConfig
from qjax.models.layouts import LAYOUTS
from qjax.models.weights import HEAD, Entry, plan

_log = logging.getLogger(__name__)

_BUFFERS = re.compile(
    r"(^|\.)rotary_emb\.inv_freq$|(^|\.)(attn|attention)\.(masked_)?bias$"
)


@dataclasses.dataclass(frozen=True)
class Match:
    """How the tensors of one checkpoint meet the plan.

    Attributes:
        names: Name in the checkpoint of every planned tensor found.
        missing: Planned tensors that are absent.
        unexpected: Tensors that nothing uses though they look like part of the model:
            of more layers than there are, or biases of weights that have none.
        unknown: Other tensors that nothing uses; a warning names them.
        ignored: Constant buffers, which carry no weights.
        wrong: `(name, shape, expected shape)` of ill-shaped tensors.
    """

    names: dict[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    unknown: tuple[str, ...]
    ignored: tuple[str, ...]
    wrong: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    def check(self, where: str = "checkpoint") -> None:
        """Raises one error that lists everything which does not fit.

        Tensors that are merely unknown are named in a warning.

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
        if self.unknown:
            _log.warning(
                "%s: %d tensors belong to no part of the model and are not used: %s",
                where,
                len(self.unknown),
                _some(self.unknown),
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
    layer = re.compile(re.escape(layout.layers) + r"\.\d+\.")

    def tail(name: str) -> str:
        """What follows the number of the layer."""
        return layer.split(name)[-1]

    known = {tail(entry.name) for entry in entries}
    known |= {name.removesuffix("weight") + "bias" for name in known}
    unexpected = [n for n in rest if tail(n) in known]
    unknown = [n for n in rest if tail(n) not in known]
    return Match(
        names,
        tuple(missing),
        tuple(unexpected),
        tuple(unknown),
        tuple(ignored),
        tuple(wrong),
    )


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

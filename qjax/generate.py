"""Text generation: prompts in, text out, whole or piece by piece.

Decides when a text ends (end token, stop string, `max_tokens`), what of it may be shown
while it grows, and how many decode steps run between looks at it: `STEPS`, fewer with
stop strings, one with a callback. The compiled work is `qjax.decoding`.

Refuses: prompts without tokens, and more tokens than the model's context holds.

Costs: reported speeds are tokens over the time from dispatch to result of the compiled
programs, which are compiled before the clock starts.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qjax.decoding import STEPS, STOP_IDS, Batch, cache_bucket, programs
from qjax.errors import SpecError
from qjax.models import Decoder
from qjax.sampling import Sampling, make_sampling
from qjax.text import TextStream, Tokenizer

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Generation:
    """What one prompt brought forth.

    Attributes:
        text: The continuation, without stop string and end token.
        tokens: Its ids, without the end token; with those of a stop string.
        prompt_tokens: Number of tokens of the prompt.
        finish_reason: `eos`, `stop` (a stop string) or `length`.
        prefill_tokens_per_second: Prompt tokens of the whole batch per second.
        decode_tokens_per_second: Further tokens of the whole batch per second; 0 where
            the first token was the last.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    finish_reason: str
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str],
    max_tokens: int = 64,
    **options: Any,
) -> str | list[str]:
    """Return the continuation of a prompt, or of each prompt of a list.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompt: A text or several.
        max_tokens: Most tokens to generate per prompt.
        **options: As for `generate_detailed`: `temperature, top_k, top_p, min_p,
            repetition_penalty, seed, stop, callback, cache_dtype, cache_rotate`.

    Returns:
        A string for a string, a list for a list.

    Raises:
        SpecError: See `generate_detailed`.

    Example:
        >>> qjax.generate(model, tokenizer, "Call me", max_tokens=32)
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    results = generate_detailed(model, tokenizer, prompts, max_tokens, **options)
    texts = [result.text for result in results]
    return texts[0] if isinstance(prompt, str) else texts


def generate_detailed(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    max_tokens: int = 64,
    *,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    min_p: float | Sequence[float] = 0.0,
    repetition_penalty: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] = (),
    callback: Callable[[str, int], None] | None = None,
    cache_dtype: Any = None,
    cache_rotate: str = "none",
) -> list[Generation]:
    """Return continuations with their tokens, reasons to end, and speeds.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: Texts or token ids, of any lengths.
        max_tokens: Most tokens to generate per prompt.
        temperature: Spread of the draw; 0 takes the most probable token. This and the
            next four: one number, or one per prompt.
        top_k: Draw from this many most probable tokens; 0 for all.
        top_p: Draw from the fewest tokens that reach this probability.
        min_p: Draw from tokens at least this times as probable as the first.
        repetition_penalty: Makes tokens that occurred less probable if above 1.
        seed: The same seed gives the same text, whatever else is in the batch: prompt
            `i` draws with `seed + i`, or with the `i`-th of a list of seeds.
        stop: Strings that end a text; they are cut off, wherever tokens break them.
        callback: Called with each new piece of text and the index of its prompt; the
            pieces of a prompt, joined, are its text.
        cache_dtype: Dtype of keys and values kept: a float dtype (the compute dtype by
            default), or `"int8"`, `"fp8"` or `"int4"` to keep codes with a scale per
            token and head.
        cache_rotate: Mix `"keys"` or `"both"` keys and values with a Hadamard matrix
            before they are quantized; `"none"` leaves them as they are.

    Raises:
        SpecError: A prompt has no tokens, prompt and `max_tokens` exceed the model's
            context, a setting is out of range, the cache's dtype is unknown, or the
            tokenizer is another model's.
    """
    tokenizer.check_vocab(model.config.vocab_size)
    ids = [_encode(tokenizer, prompt, i) for i, prompt in enumerate(prompts)]
    if not ids:
        return []
    _check_lengths(ids, max_tokens, model.config)
    settings = make_sampling(
        len(ids),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    stops = [stop] if isinstance(stop, str) else list(stop)
    if not all(isinstance(s, str) and s for s in stops):
        raise SpecError(f"stop={stop!r}: expected non-empty strings")
    rows = [
        _Row(tokenizer.stream(prompt), tokenizer.eos_ids, stops, i, callback)
        for i, prompt in enumerate(ids)
    ]
    steps = 1 if callback else (8 if stops else STEPS)
    batch = _make_batch(tokenizer, ids, max_tokens, settings, seed, model.config)
    size, length = batch.tokens.shape
    compiled = programs(model, size, length, cache_dtype, cache_rotate)
    speeds = _run(compiled, batch, rows, max_tokens, steps)
    return [
        Generation(row.text, row.tokens, len(prompt), row.reason or "length", *speeds)
        for row, prompt in zip(rows, ids, strict=True)
    ]


def _encode(tokenizer: Tokenizer, prompt: Prompt, index: int) -> list[int]:
    """Return a prompt's ids; SpecError where there are none."""
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
        hint = "; this tokenizer opens texts with no BOS token" if not prompt else ""
    elif not isinstance(prompt, Sequence):
        raise SpecError(
            f"generate: prompt {index} is {type(prompt).__name__}, expected a string "
            "or a list of ids"
        )
    else:
        ids, hint = [int(token) for token in prompt], ""
        if any(not 0 <= token < tokenizer.vocab_size for token in ids):
            raise SpecError(
                f"generate: prompt {index} has ids outside the tokenizer's "
                f"{tokenizer.vocab_size}"
            )
    if not ids:
        raise SpecError(
            f"generate: prompt {index} is empty{hint}; give at least one token to "
            "continue"
        )
    return ids


def _check_lengths(ids: list[list[int]], max_tokens: int, config: Any) -> None:
    """Raise SpecError where the context does not hold prompt and continuation."""
    if max_tokens < 1:
        raise SpecError(f"generate: max_tokens={max_tokens}, expected at least 1")
    context = config.max_context
    for index, prompt in enumerate(ids):
        room = context - len(prompt)
        if room < 1:
            raise SpecError(
                f"generate: prompt {index} has {len(prompt)} tokens, but the model's "
                f"context is {context}; shorten the prompt"
            )
        if max_tokens > room:
            raise SpecError(
                f"generate: prompt {index} has {len(prompt)} tokens and max_tokens is "
                f"{max_tokens}, but the model's context is {context}; use max_tokens "
                f"of at most {room}"
            )


class _Row:
    """One prompt's growing text, on the host."""

    def __init__(
        self,
        stream: TextStream,
        eos_ids: tuple[int, ...],
        stops: list[str],
        index: int,
        callback: Callable[[str, int], None] | None,
    ):
        self.tokens: list[int] = []
        self.drawn = 0
        self.text = ""
        self.reason: str | None = None
        self._stream, self._eos, self._stops = stream, eos_ids, stops
        self._index, self._callback, self._sent = index, callback, 0

    def push(self, token: int) -> None:
        """Take one token, unless the text has ended."""
        if self.reason is not None:
            return
        self.drawn += 1
        if token in self._eos:
            self.finish("eos")
            return
        self.tokens.append(token)
        self._add(self._stream.push(token))

    def finish(self, reason: str) -> None:
        """End the text with what the decoder still held."""
        if self.reason is None:
            self._add(self._stream.finish())
        if self.reason is None:
            self.reason = reason
            self._send(len(self.text))

    def _add(self, piece: str) -> None:
        """Append text; cut it at the first stop string, hold back what may be one."""
        old = len(self.text)
        self.text += piece
        found = [
            at
            for stop in self._stops
            if (at := self.text.find(stop, max(0, old - len(stop) + 1))) >= 0
        ]
        if found:
            self.text = self.text[: min(found)]
            self.reason = "stop"
            self._send(len(self.text))
            return
        held = max(
            (
                size
                for stop in self._stops
                for size in range(1, len(stop))
                if self.text.endswith(stop[:size])
            ),
            default=0,
        )
        self._send(len(self.text) - held)

    def _send(self, end: int) -> None:
        """Give the callback what it has not seen up to `end`."""
        if self._callback is not None and end > self._sent:
            self._callback(self.text[self._sent : end], self._index)
        self._sent = max(self._sent, end)


def _make_batch(
    tokenizer: Tokenizer,
    ids: list[list[int]],
    max_tokens: int,
    settings: Sampling,
    seed: int | Sequence[int],
    config: Any,
) -> Batch:
    """Return the arrays the compiled programs take."""
    lengths = np.array([len(prompt) for prompt in ids], np.int32)
    length = cache_bucket(int(lengths.max()) + max_tokens, config.max_context)
    tokens = np.full((len(ids), length), tokenizer.pad_id, np.int32)
    for row, prompt in enumerate(ids):
        tokens[row, : len(prompt)] = prompt
    each = np.ndim(seed) > 0
    seeds = list(seed) if each else [int(seed) + i for i in range(len(ids))]  # pyright: ignore[reportArgumentType]
    if len(seeds) != len(ids):
        raise SpecError(f"seed: got {len(seeds)} seeds, expected one or {len(ids)}")
    eos = tokenizer.eos_ids[:STOP_IDS]
    return Batch(
        tokens=tokens,
        lengths=lengths,
        seeds=np.array([int(value) % 2**32 for value in seeds], np.uint32),
        stop_ids=np.array([*eos, *[-1] * (STOP_IDS - len(eos))], np.int32),
        settings=settings,
    )


def _run(
    compiled: tuple[Any, ...],
    batch: Batch,
    rows: list[_Row],
    max_tokens: int,
    steps: int,
) -> tuple[float, float]:
    """Fill `rows`; return tokens per second of prefill and of decode."""
    prefill, decode, params = compiled
    start = time.perf_counter()
    state, first = prefill(params, batch)
    fresh = np.asarray(first)[:, None]
    prefill_seconds, decode_seconds, left = time.perf_counter() - start, 0.0, max_tokens
    while True:
        for row, new in zip(rows, fresh, strict=True):
            for token in new.tolist():
                row.push(token)
        left -= fresh.shape[1]
        if left <= 0 or all(row.reason for row in rows):
            break
        start = time.perf_counter()
        state, made, done = decode(params, state, batch, np.int32(min(steps, left)))
        fresh = np.asarray(made)[:, : int(done)]
        decode_seconds += time.perf_counter() - start
    for row in rows:
        row.finish("length")
    drawn = sum(row.drawn - 1 for row in rows)
    return (
        float(batch.lengths.sum()) / max(prefill_seconds, 1e-9),
        drawn / decode_seconds if drawn else 0.0,
    )

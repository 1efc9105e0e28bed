"""Perplexity protocols: which windows of a text are read, and which tokens count.

A protocol decides only this, so each is one function from token ids to `Windows`.
Numbers of different protocols are not comparable: for one set of LLaMA-2-7B weights
they span 5.1 to 8.7.

Refuses: a text shorter than one window, and a context longer than the model's.
Costs: windows are index ranges into one token array until a batch is cut.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from qjax.errors import SpecError

PROTOCOLS = ("gptq", "stride", "llama.cpp")


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows over a token array.

    Window `i` reads `tokens[start[i] : start[i] + length[i]]` and scores the tokens
    from its `first[i]`-th on (at least 1: the first token of a window has no context).

    Attributes:
        tokens: The text, `[tokens]` int32.
        context: Length that every window is padded to.
        start: First token of each window.
        length: Tokens in each window.
        first: First scored token, counted inside each window.
        bos_id: Id written over the first token of each window, or None.
    """

    tokens: np.ndarray
    context: int
    start: np.ndarray
    length: np.ndarray
    first: np.ndarray
    bos_id: int | None = None

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.start)

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return int((self.length - self.first).sum())

    def limit(self, count: int | None) -> "Windows":
        """Return the first `count` windows; all where `count` is None."""
        if count is None:
            return self
        if count < 1:
            raise SpecError(f"perplexity: windows={count}, expected at least 1")
        return dataclasses.replace(
            self,
            start=self.start[:count],
            length=self.length[:count],
            first=self.first[:count],
        )

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield `tokens[size, context]` and the mask of scored tokens, padded."""
        position = np.arange(self.context)
        for begin in range(0, len(self), size):
            rows = slice(begin, begin + size)
            index = self.start[rows, None] + position
            tokens = self.tokens[np.minimum(index, len(self.tokens) - 1)]
            if self.bos_id is not None:
                tokens[:, 0] = self.bos_id
            mask = (position >= self.first[rows, None]) & (
                position < self.length[rows, None]
            )
            short = size - len(tokens)
            yield (
                np.pad(tokens, ((0, short), (0, 0))),
                np.pad(mask, ((0, short), (0, 0))),
            )

    def scored_tokens(self) -> np.ndarray:
        """Return the index into `tokens` of every scored token, window by window."""
        ranges = zip(self.start + self.first, self.start + self.length, strict=True)
        return np.concatenate([np.arange(begin, end) for begin, end in ranges])


def plan_windows(
    tokens: np.ndarray,
    protocol: str,
    context: int,
    *,
    stride: int | None = None,
    bos_id: int | None = None,
) -> Windows:
    """Return the windows that `protocol` reads.

    - `gptq`: adjacent windows, the incomplete last one dropped; every token but the
      first of each window is scored.
    - `stride`: windows begin every `stride` tokens and score what no earlier window
      did, so that most tokens see at least `context - stride` tokens before them.
    - `llama.cpp`: adjacent windows, each opened by BOS (written over its first token)
      where the tokenizer adds BOS; only the second half is scored.

    Args:
        tokens: Ids of the whole text, encoded at once.
        protocol: One of `PROTOCOLS`.
        context: Window length in tokens.
        stride: For `stride`: step between windows; `context // 2` by default.
        bos_id: For `llama.cpp`: the BOS id where the tokenizer adds it, else None.

    Raises:
        SpecError: Unknown protocol, impossible lengths, or a text shorter than one
            window.

    Reference:
        IST-DASLab/gptq `opt_eval`; Hugging Face "Perplexity of fixed-length models";
        llama.cpp `tools/perplexity`.
    """
    if protocol not in PROTOCOLS:
        raise SpecError(
            f"perplexity: unknown protocol {protocol!r}; expected one of "
            f"{', '.join(PROTOCOLS)}"
        )
    if context < 2:
        raise SpecError(f"perplexity: context={context}, expected at least 2 tokens")
    if stride is not None and protocol != "stride":
        raise SpecError(f"perplexity: protocol {protocol!r} takes no stride")
    if len(tokens) < context:
        raise SpecError(
            f"perplexity: the text has {len(tokens)} tokens, shorter than one window "
            f"of {context}; use a longer text or a smaller context"
        )
    tokens = np.asarray(tokens, np.int32)
    if protocol == "stride":
        return _overlapping(tokens, context, context // 2 if stride is None else stride)
    count = len(tokens) // context
    first = 1 if protocol == "gptq" else context // 2 + 1
    if first >= context:
        raise SpecError(
            f"perplexity: protocol {protocol!r} scores nothing at context={context}; "
            "use at least 4"
        )
    return Windows(
        tokens,
        context,
        start=np.arange(count) * context,
        length=np.full(count, context),
        first=np.full(count, first),
        bos_id=bos_id if protocol == "llama.cpp" else None,
    )


def _overlapping(tokens: np.ndarray, context: int, stride: int) -> Windows:
    """Return windows every `stride` tokens, up to the first that reaches the end."""
    if not 1 <= stride <= context:
        raise SpecError(
            f"perplexity: stride={stride}, expected 1 to the context, {context}"
        )
    count = 1 + -(-(len(tokens) - context) // stride)
    start = np.arange(count) * stride
    end = np.minimum(start + context, len(tokens))
    previous = np.concatenate([[0], end[:-1]])
    return Windows(
        tokens,
        context,
        start=start,
        length=end - start,
        first=np.maximum(previous - start, 1),
    )

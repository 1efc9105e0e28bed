"""Adapter: lm-evaluation-harness runs its tasks on a qjax model.

    import lm_eval
    from qjax.evaluate.lm_eval import as_harness_model
    lm_eval.simple_evaluate(as_harness_model(model, tokenizer), tasks=["hellaswag"])

Decides: requests are sorted by length and padded on the right to few lengths in batches
of one size, so that few programs are compiled and no score depends on its neighbours.
Inputs longer than the context keep their end, as the harness's own models do.

Refuses to start without lm_eval (extra `[eval]`), with the line that installs it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qjax.errors import MissingExtraError
from qjax.evaluate.scoring import as_scorer, judge_rows
from qjax.generate import generate_detailed
from qjax.models import Decoder
from qjax.text import Tokenizer

Answer = tuple[float, bool]


def as_harness_model(
    model: Decoder,
    tokenizer: Tokenizer,
    *,
    batch: int = 8,
    max_length: int | None = None,
    max_gen_toks: int = 256,
) -> Any:
    """Return an instance of `lm_eval.api.model.TemplateLM` that runs `model`.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        batch: Requests per step; changes speed and memory, not scores.
        max_length: Tokens the model reads; its context by default.
        max_gen_toks: Most tokens to generate where a task does not say.

    Raises:
        MissingExtraError: lm_eval is not installed.
        SpecError: The tokenizer is another model's.
    """
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError:
        raise MissingExtraError(
            'the harness adapter needs lm_eval; run: pip install "qjax-llm[eval]"'
        ) from None
    tokenizer.check_vocab(model.config.vocab_size)
    kind = type("QjaxLM", (_Adapter, TemplateLM), {"__doc__": _Adapter.__doc__})
    adapter = kind()
    adapter.model, adapter.scorer = model, as_scorer(model)
    adapter.tokenizer, adapter.batch = tokenizer, batch
    adapter.max_length = min(max_length or model.config.max_context,
                             model.config.max_context)  # fmt: skip
    adapter.max_gen_toks = max_gen_toks
    return adapter


class _Adapter:
    """The harness's requests, answered by a qjax model."""

    model: Decoder
    scorer: Any
    tokenizer: Tokenizer
    batch: int
    max_length: int
    max_gen_toks: int
    cache_hook: Any

    @property
    def eot_token_id(self) -> int:
        """Id that ends a text."""
        return self.tokenizer.pad_id if self.tokenizer.eos_id is None else (
            self.tokenizer.eos_id)  # fmt: skip

    @property
    def prefix_token_id(self) -> int:
        """Id that stands before a text without context: BOS, else the end token."""
        bos = self.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness caches templated requests."""
        return f"qjax-{self.tokenizer.vocab_size}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return ids; by default BOS as configured, unless the text writes it."""
        if add_special_tokens is None:
            bos = self.tokenizer.special_tokens.get("bos_token")
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the text of a conversation."""
        return self.tokenizer.apply_chat_template(
            chat_history, add_generation_prompt=add_generation_prompt
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[Answer]:
        """Return log-probability of each continuation, and whether it is greedy."""
        answers = self._score([(c, t) for _, c, t in requests])
        for (key, *_ids), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of whole texts, every token scored once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        del disable_tqdm
        pairs, owners = [], []
        for index, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._score(pairs), strict=True):
            totals[owner] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """Return continuations up to each task's stop strings."""
        del disable_tqdm
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        texts = [""] * len(requests)
        for members in groups.values():
            settings = dict(requests[members[0]].args[1])
            count = int(settings.get("max_gen_toks", self.max_gen_toks))
            count = max(1, min(count, self.max_length - 1))
            prompts = [
                self.tok_encode(requests[i].args[0])[-(self.max_length - count) :]
                or [self.prefix_token_id]
                for i in members
            ]
            made = self._generate(prompts, count, settings)
            for index, text in zip(members, made, strict=True):
                texts[index] = text
                self.cache_hook.add_partial(
                    "generate_until", requests[index].args, text
                )
        return texts

    def _generate(
        self, prompts: list[list[int]], count: int, settings: dict[str, Any]
    ) -> list[str]:
        """Return continuations of prompts that share their settings."""
        until = settings.get("until") or []
        sampled = settings.get("do_sample", True)
        texts = [""] * len(prompts)
        for members in _batches([len(p) for p in prompts], self.batch):
            results = generate_detailed(
                self.model,
                self.tokenizer,
                [prompts[i] for i in members],
                count,
                temperature=settings.get("temperature", 0.0) if sampled else 0.0,
                top_k=settings.get("top_k", 0),
                top_p=settings.get("top_p", 1.0),
                stop=[until] if isinstance(until, str) else [s for s in until if s],
            )
            for index, result in zip(members, results, strict=True):
                texts[index] = result.text
        return texts

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Answer]:
        """Return sum of log-probabilities and greedy match of every continuation."""
        answers: list[Answer] = [(0.0, True)] * len(pairs)
        rows = [(list(c) + list(t))[-(self.max_length + 1) :] for c, t in pairs]
        for members in _batches([len(row) for row in rows], self.batch):
            longest = max(len(rows[i]) for i in members)
            width = min(_length_bucket(longest - 1), self.max_length) + 1
            tokens = np.full((self.batch, width), self.tokenizer.pad_id, np.int32)
            for at, index in enumerate(members):
                tokens[at, : len(rows[index])] = rows[index]
            logp, greedy = judge_rows(self.scorer, tokens)
            for at, index in enumerate(members):
                end = len(rows[index]) - 1
                part = slice(max(0, end - len(pairs[index][1])), end)
                score = float(logp[at, part].astype(np.float64).sum())
                answers[index] = (score, bool(greedy[at, part].all()))
        return answers


def _batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return indices in batches of at most `size`, longest first.

    A batch too large for memory then fails at once and not at the end.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i : i + size] for i in range(0, len(order), size)]


def _length_bucket(length: int) -> int:
    """Return the padded length: powers of two from 32 to 512, then multiples of 512."""
    if length <= 512:
        return max(32, 1 << max(length - 1, 0).bit_length())
    return -(-length // 512) * 512

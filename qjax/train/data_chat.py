"""Conversations to text, and where the answers are in it.

A template's own `{% generation %}` marks decide. Without them a conversation is
rendered up to every answer, once as the model will be asked for it and once with it;
what the second adds is the answer. Some templates rewrite earlier turns when later ones
follow, such as those that drop earlier thoughts; an answer that the whole conversation
does not show as it was given becomes a sample of its own.

Templates see `NOW` as the time, whatever day it is, so that a set is the same tomorrow.

Costs: one process a few hundred conversations, and without marks a rendering before and
after every answer.
"""

import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from qjax import chat
from qjax.errors import FormatError, SpecError
from qjax.text import Tokenizer
from qjax.train.data_sources import Place, string_field

NOW = "2025-01-01T00:00:00"
ROLES = ("system", "developer", "user", "assistant", "tool")
CHATML = (
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{ message.content + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_MARKED = re.compile(r"\{%[-+]?\s*generation\b")
_CHARACTERS = 2_000_000  # of messages given to one rendering process
_SECONDS = 120.0


class Piece(NamedTuple):
    """Text of one sample.

    Attributes:
      text: All of it.
      spans: First character and end of what is learned; None means everything.
      plain: Whether opening and end tokens are to be added.
    """

    text: str
    spans: tuple[tuple[int, int], ...] | None
    plain: bool


class Conversation(NamedTuple):
    """Messages of a record.

    Attributes:
      place: Where the record stands.
      messages: Them, up to the last answer.
      first: Number of the first that may be learned.
      tools: JSON schemas of tools, for templates that show them.
    """

    place: Place
    messages: list[dict[str, Any]]
    first: int = 0
    tools: list[Any] | None = None


def find_template(name: str | None, tokenizer: Tokenizer) -> str | None:
    """Returns the source of a chat template.

    Args:
      name: Jinja source, the path of a file with it, or "chatml"; None is the
        tokenizer's own, if it has one.
      tokenizer: Where to look then.

    Raises:
      SpecError: There is no such file, or it is too large.
      FormatError: It is not UTF-8.
    """
    if name is None:
        return tokenizer.chat_template
    if name == "chatml":
        return CHATML
    if "{{" in name or "{%" in name:
        return name
    if not os.path.isfile(name):
        raise SpecError(
            f"data: template {name!r} is neither a file, nor 'chatml', nor the source "
            "of a template, which holds {{ or {%"
        )
    if os.path.getsize(name) > chat.SOURCE_LIMIT:
        raise SpecError(f"{name}: larger than {chat.SOURCE_LIMIT} bytes")
    try:
        with open(name, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise FormatError(f"{name}: not UTF-8 at byte {error.start}") from None


def make_conversation(
    place: Place, messages: Any, first: int = 0, tools: Any = None
) -> Conversation:
    """Returns checked messages.

    Raises:
      FormatError: They are not a conversation with an answer to learn.
    """
    try:
        chat.check_messages(messages)
    except SpecError as error:
        raise FormatError(f"{place}: {error}") from None
    if tools is not None and not isinstance(tools, list):
        raise FormatError(f"{place}: tools is {type(tools).__name__}, expected a list")
    for number, message in enumerate(messages):
        where = f"{place}: messages[{number}]"
        if message["role"] not in ROLES:
            raise FormatError(
                f"{where}: role {message['role']!r:.80}, expected one of {ROLES}"
            )
        if message.get("content") is None and message.get("tool_calls"):
            continue
        string_field(message, "content", where)
    answers = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    if not answers or answers[-1] < first:
        raise FormatError(
            f"{place}: the conversation has no message with role 'assistant' to learn"
        )
    return Conversation(place, messages[: answers[-1] + 1], first, tools)


def render_all(
    talks: Sequence[Conversation],
    template: str,
    tokenizer: Tokenizer,
    completion_only: bool,
) -> Iterator[list[Piece]]:
    """Yields the pieces of every conversation.

    Raises:
      SpecError: The template cannot be used, or answers cannot be found in its text.
      FormatError: A conversation without marks starts with an answer.
    """
    marked = bool(_MARKED.search(template)) and completion_only
    waiting: list[tuple[Conversation, list[dict[str, Any]]]] = []
    size = 0
    for talk in talks:
        by_answer = completion_only and (not marked or talk.first > 0)
        own = _requests(talk, tokenizer, by_answer)
        waiting.append((talk, own))
        size += sum(len(str(m)) for request in own for m in request["messages"])
        if size > _CHARACTERS:
            yield from _render(waiting, template, marked)
            waiting, size = [], 0
    if waiting:
        yield from _render(waiting, template, marked)


def _render(
    waiting: Sequence[tuple[Conversation, list[dict[str, Any]]]],
    template: str,
    marked: bool,
) -> Iterator[list[Piece]]:
    requests = [request for _, own in waiting for request in own]
    names = [str(talk.place) for talk, own in waiting for _ in own]
    drawn = iter(
        chat.render_many(
            template, requests, seconds=_SECONDS, spans=marked, now=NOW, names=names
        )
    )
    for talk, own in waiting:
        mine = list(islice(drawn, len(own)))
        if len(own) > 1:
            yield _answers(talk, [one.text for one in mine])
        else:
            spans = mine[0].spans if marked else None
            yield [Piece(mine[0].text, spans, False)]


def _requests(
    talk: Conversation, tokenizer: Tokenizer, by_answer: bool
) -> list[dict[str, Any]]:
    """Returns what to render: all of it, or two texts an answer."""
    common = {**tokenizer.special_tokens, "tools": talk.tools, "documents": None}

    def request(count: int, asks: bool) -> dict[str, Any]:
        messages = talk.messages[:count]
        return {**common, "messages": messages, "add_generation_prompt": asks}

    if not by_answer:
        return [request(len(talk.messages), False)]
    answers = _answer_numbers(talk)
    if answers[0] == 0:
        raise FormatError(
            f"{talk.place}: the conversation starts with an answer; begin with a "
            "message of another role, or set completion_only=False"
        )
    return [request(n + asked, not asked) for n in answers for asked in (False, True)]


def _answer_numbers(talk: Conversation) -> list[int]:
    return [
        number
        for number, message in enumerate(talk.messages)
        if message["role"] == "assistant" and number >= talk.first
    ]


def _answers(talk: Conversation, texts: list[str]) -> list[Piece]:
    """Returns pieces from the texts before and after every answer."""
    whole, shown, pieces = texts[-1], [], []
    for number, asked, answered in zip(
        _answer_numbers(talk), texts[::2], texts[1::2], strict=True
    ):
        cut = _shared(asked, answered)
        before = (talk.messages[number - 1].get("content") or "").strip()
        whole_prompt = cut == len(asked) or before in answered[:cut]
        if not whole_prompt or cut == len(answered):
            raise SpecError(
                f"{talk.place}: the chat template writes what comes before messages"
                f"[{number}] differently when the answer follows, so the answer cannot "
                "be told apart; mark it with {% generation %} in the template, or set "
                "completion_only=False"
            )
        span = (cut, len(answered))
        if whole.startswith(answered):
            shown.append(span)
        else:
            pieces.append(Piece(answered, (span,), False))
    return [*pieces, Piece(whole, tuple(shown), False)]


def _shared(one: str, other: str) -> int:
    """Returns how many characters two texts start with together."""
    if other.startswith(one):
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))

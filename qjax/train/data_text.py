"""Records to token ids, and which of them the loss counts.

Only answers are learned: the completion of a prompt, the output of an instruction, what
the assistant says; of plain text, all of it. Texts are cut in characters and tokenized
whole: an answer starts at the first token that the text before it, tokenized alone,
does not have. A turn of a conversation is learned up to its last end token.

Text without a template gets the tokenizer's opening tokens and its end token; a
template writes both itself.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from qjax.errors import SpecError
from qjax.text import Tokenizer
from qjax.train.data_chat import (
    Conversation,
    Piece,
    make_conversation,
    render_all,
)
from qjax.train.data_packing import Sample
from qjax.train.data_sources import Record, string_field

_CHUNK = 256  # records tokenized at a time


def instruction_prompt(instruction: str, context: str = "") -> str:
    """Returns what stands before the answer where there is no chat template.

    Args:
      instruction: What to do.
      context: What to do it with; may be empty.
    """
    middle = f"### Input:\n{context}\n\n" if context.strip() else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def make_samples(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    *,
    field: str = "text",
    template: str | None = None,
    completion_only: bool = True,
) -> Iterator[Sample]:
    """Yields the samples of records, in order.

    Args:
      records: What `read_records` yields.
      tokenizer: Turns text into ids.
      field: Name of the field with the text.
      template: Source of a chat template, or None where there is none.
      completion_only: Whether only answers are learned.

    Raises:
      FormatError: A record holds what no sample can be made of.
      SpecError: A conversation and no template, or one that cannot be used.
    """
    read = enumerate(records)
    while chunk := list(islice(read, _CHUNK)):
        contents = [_content(record, field, template) for _, record in chunk]
        talks = [c for c in contents if isinstance(c, Conversation)]
        if talks and template is None:
            raise SpecError(
                f"{talks[0].place}: a conversation needs a chat template, and the "
                "tokenizer has none; set template to a file, or to 'chatml'"
            )
        drawn = render_all(talks, template or "", tokenizer, completion_only)
        owners: list[tuple[int, Record]] = []
        pieces: list[Piece] = []
        for owner, content in zip(chunk, contents, strict=True):
            own = next(drawn) if isinstance(content, Conversation) else [content]
            pieces += own
            owners += [owner] * len(own)
        encoded = _encode(pieces, tokenizer, completion_only)
        for (number, record), (ids, learned) in zip(owners, encoded, strict=True):
            document = record.layout == "document"
            yield Sample(ids, learned, record.place, number, document=document)


def _content(record: Record, field: str, template: str | None) -> Piece | Conversation:
    """Returns what a record says, its types checked."""
    fields, place = record.fields, record.place
    if record.layout == "document":
        return Piece(fields["text"], None, True)
    if record.layout == "text":
        return Piece(string_field(fields, field, place, filled=True), None, True)
    if record.layout == "messages":
        return make_conversation(place, fields["messages"], tools=fields.get("tools"))
    if record.layout == "prompt":
        asked, answered = fields["prompt"], fields["completion"]
        if isinstance(asked, list) and isinstance(answered, list):
            both = asked + answered
            return make_conversation(place, both, len(asked), fields.get("tools"))
        prompt = string_field(fields, "prompt", place)
        answer = string_field(fields, "completion", place, filled=True)
    else:
        asked = string_field(fields, "instruction", place, filled=True)
        context = string_field(fields, "input", place) if fields.get("input") else ""
        answer = string_field(fields, "output", place, filled=True)
        if template is not None:
            text = f"{asked}\n\n{context}" if context.strip() else asked
            turns = [("user", text), ("assistant", answer)]
            messages = [{"role": role, "content": said} for role, said in turns]
            return Conversation(place, messages)
        prompt = instruction_prompt(asked, context)
    text = prompt + answer
    return Piece(text, ((len(prompt), len(text)),), True)


def _encode(
    pieces: Sequence[Piece], tokenizer: Tokenizer, completion_only: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields ids of every piece, and which are learned."""
    cut = [_cut(piece, completion_only) for piece in pieces]
    texts = list(dict.fromkeys(text for parts in cut for text in parts))
    encoded = tokenizer.backend.encode_batch(texts, add_special_tokens=False)
    ids_of = {
        text: np.array(one.ids, np.int32)
        for text, one in zip(texts, encoded, strict=True)
    }
    ends = np.array(tokenizer.eos_ids, np.int32)
    opening = np.array(tokenizer.encode(""), np.int32)
    for piece, (text, *before) in zip(pieces, cut, strict=True):
        ids = ids_of[text]
        learned = np.full(len(ids), not before)
        bounds = [_common(ids, ids_of[other]) for other in before]
        for start, end in zip(bounds[::2], bounds[1::2], strict=True):
            stops = np.flatnonzero(np.isin(ids[start:end], ends))
            if len(stops) and not piece.plain:
                end = start + int(stops[-1]) + 1
            learned[start:end] = True
        if piece.plain:
            ids, learned = _enclosed(ids, learned, opening, tokenizer)
        yield ids, learned


def _cut(piece: Piece, completion_only: bool) -> list[str]:
    """Returns a piece's text, and what precedes every start and end to learn."""
    if piece.spans is None or not completion_only:
        return [piece.text]
    bounds = [bound for span in piece.spans for bound in span] or [0, 0]
    return [piece.text, *(piece.text[:bound] for bound in bounds)]


def _common(ids: np.ndarray, other: np.ndarray) -> int:
    """Returns how many ids two start with together."""
    size = min(len(ids), len(other))
    differ = np.flatnonzero(ids[:size] != other[:size])
    return int(differ[0]) if len(differ) else size


def _enclosed(
    ids: np.ndarray, learned: np.ndarray, opening: np.ndarray, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids with the opening and end tokens that are not written out."""
    if not np.array_equal(ids[: len(opening)], opening):
        ids = np.concatenate([opening, ids])
        learned = np.concatenate([np.zeros(len(opening), bool), learned])
    if tokenizer.eos_id is not None and int(ids[-1]) not in tokenizer.eos_ids:
        ids = np.append(ids, np.int32(tokenizer.eos_id))
        learned = np.append(learned, True)
    return ids, learned

"""Records to tokens: what is learned is the answer and its end, to the token."""

import re

import numpy as np
import pytest
import tokenizers

from qjax.errors import FormatError, SpecError
from qjax.text import Tokenizer
from qjax.train.data_chat import CHATML, find_template
from qjax.train.data_sources import Place, Record
from qjax.train.data_text import instruction_prompt, make_samples
from tests.byte_tokenizer import CONFIG, make_backend

UNMARKED = re.sub(r"\{% (end)?generation %\}", "", CHATML)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


TALK = [
    turn("system", "Be brief."),
    turn("user", "Hi"),
    turn("assistant", "Yo é"),
    turn("user", "Why?"),
    turn("assistant", "So."),
]


def make_tokenizer(bos=False, **config):
    backend = make_backend(bos)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(backend, config=CONFIG | {"eos_token": "<|im_end|>"} | config)


def samples(layout, *fields, tokenizer=None, **options):
    records = [Record(Place("a.jsonl", n), layout, f) for n, f in enumerate(fields, 1)]
    return list(make_samples(records, tokenizer or make_tokenizer(), **options))


def shown(sample, tokenizer=None):
    """The whole text of a sample, and what of it is learned."""
    decode = (tokenizer or make_tokenizer()).decode
    return tuple(
        decode(ids, skip_special_tokens=False)
        for ids in (sample.ids, sample.ids[sample.learned])
    )


@pytest.mark.parametrize("bos", [False, True])
def test_text(bos):
    """All is learned; opening and end tokens are added once."""
    tokenizer = make_tokenizer(bos)
    fields = [{"text": "ab"}, {"text": "<s>ab<|im_end|>"}]
    plain, written = samples("text", *fields, tokenizer=tokenizer)
    opening = "<s>" if bos else ""
    assert shown(plain) == (f"{opening}ab<|im_end|>", "ab<|im_end|>")
    assert shown(written)[0] == "<s>ab<|im_end|>"
    assert plain.ids.dtype == np.int32 and not plain.document
    assert [str(plain.place), written.record] == ["a.jsonl:1", 1]


def test_other_fields_and_documents():
    (sample,) = samples("text", {"body": "x"}, field="body")
    assert shown(sample)[0] == "x<|im_end|>"
    (sample,) = samples("document", {"text": "x"})
    assert sample.document and sample.learned.all()


def test_prompt_and_completion():
    """The completion is learned, with the end; everything if so asked."""
    fields = {"prompt": "2+2=", "completion": "4"}
    (sample,) = samples("prompt", fields)
    assert shown(sample) == ("2+2=4<|im_end|>", "4<|im_end|>")
    (sample,) = samples("prompt", fields, completion_only=False)
    assert shown(sample)[1] == "2+2=4<|im_end|>"
    inner = {"prompt": "a", "completion": "b<|im_end|>c"}
    assert shown(samples("prompt", inner)[0])[1] == "b<|im_end|>c<|im_end|>"


def test_a_token_across_the_border_is_learned():
    """Tokens are those of the whole text; the one that holds both belongs to it."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={"a": 0, "b": 1, "c": 2, "bc": 3, "</s>": 4}, merges=[("b", "c")]
        )
    )
    tokenizer = Tokenizer(backend, config={"eos_token": "</s>"})
    fields = {"prompt": "ab", "completion": "ca"}
    (sample,) = samples("prompt", fields, tokenizer=tokenizer)
    assert sample.ids.tolist() == [0, 3, 0, 4]
    assert sample.learned.tolist() == [False, True, True, True]


def test_instructions():
    """Without a template in a layout of their own, with one as a conversation."""
    fields = {"instruction": "Add.", "input": "1 2", "output": "3"}
    (sample,) = samples("instruction", fields)
    prompt = "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    assert instruction_prompt("Add.", "1 2") == prompt
    assert instruction_prompt("Add.") == prompt.replace("### Input:\n1 2\n\n", "")
    assert shown(sample) == (prompt + "3<|im_end|>", "3<|im_end|>")
    (sample,) = samples("instruction", fields, template=CHATML)
    messages = [turn("user", "Add.\n\n1 2"), turn("assistant", "3")]
    (talk,) = samples("messages", {"messages": messages}, template=CHATML)
    assert shown(sample) == shown(talk)


@pytest.mark.parametrize("template", [CHATML, UNMARKED])
def test_conversation(template):
    """With marks or without, every answer with its end is learned, nothing else."""
    (sample,) = samples(
        "messages", {"messages": [*TALK, turn("user", "unseen")]}, template=template
    )
    text, learned = shown(sample)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    assert text.endswith("<|im_start|>assistant\nSo.<|im_end|>\n")
    assert learned == "Yo é<|im_end|>So.<|im_end|>"
    (whole,) = samples(
        "messages", {"messages": TALK}, template=template, completion_only=False
    )
    assert shown(whole) == (text, text)


def test_like_transformers():
    """Ids and masks are those of transformers for a template with marks."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = make_tokenizer()
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    expected = other.apply_chat_template(
        TALK,
        chat_template=CHATML,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    for template in (CHATML, UNMARKED):
        (sample,) = samples("messages", {"messages": TALK}, template=template)
        assert sample.ids.tolist() == expected["input_ids"]
        assert sample.learned.tolist() == [m == 1 for m in expected["assistant_masks"]]


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_templates_that_rewrite_earlier_turns():
    """Each answer is learned in the text the model will be asked with."""
    first, last = samples("messages", {"messages": TALK}, template=THINKING)
    assert shown(first)[1] == "<think>\n\n</think>\n\nYo é<|im_end|>"
    assert shown(first)[0].endswith("Yo é<|im_end|>\n")
    assert shown(last)[1] == "<think>\n\n</think>\n\nSo.<|im_end|>"
    assert "assistant\nYo é<|im_end|>" in shown(last)[0]
    assert first.record == last.record


def test_a_prompt_that_says_more_than_the_turn():
    """What an open answer starts with, but a given one does not, is not learned."""
    template = UNMARKED.replace(
        "assistant\\n' }}{% endif", "assistant\\n<t>' }}{% endif"
    )
    assert template != UNMARKED
    (sample,) = samples("messages", {"messages": TALK}, template=template)
    assert shown(sample)[1] == "Yo é<|im_end|>So.<|im_end|>"


def test_conversation_as_prompt_and_completion():
    """Answers in the prompt are context, even where the template marks them."""
    fields = {"prompt": TALK[:4], "completion": TALK[4:]}
    (sample,) = samples("prompt", fields, template=CHATML)
    assert shown(sample)[1] == "So.<|im_end|>"


def test_tools_and_special_tokens_reach_the_template():
    template = "{{ bos_token }}{{ tools[0].name }}" + CHATML
    fields = {"messages": TALK, "tools": [{"name": "clock"}]}
    (sample,) = samples("messages", fields, template=template)
    assert shown(sample)[0].startswith("<s>clock<|im_start|>")
    call = turn("assistant", None, tool_calls=[{"name": "clock"}])
    calls = "{% for m in messages %}{{ m.role }}{{ m.tool_calls or '' }}{% endfor %}"
    template = calls + "{% if add_generation_prompt %}assistant{% endif %}"
    (sample,) = samples("messages", {"messages": [TALK[1], call]}, template=template)
    assert shown(sample)[1] == "[{'name': 'clock'}]"


def test_the_date_stands_still():
    template = "{{ strftime_now('%Y-%m-%d') }}" + CHATML
    (sample,) = samples("messages", {"messages": TALK}, template=template)
    assert shown(sample)[0].startswith("2025-01-01")


def test_many_records_in_order(monkeypatch):
    """Chunks of records and of renderings change nothing."""
    from qjax.train import data_chat, data_text

    talks = [
        {"messages": [turn("user", "Hi"), turn("assistant", str(n))]} for n in range(9)
    ]
    whole = [shown(s) for s in samples("messages", *talks, template=UNMARKED)]
    monkeypatch.setattr(data_text, "_CHUNK", 4)
    monkeypatch.setattr(data_chat, "_CHARACTERS", 150)
    parts = samples("messages", *talks, template=UNMARKED)
    assert [shown(s) for s in parts] == whole
    assert [s.record for s in parts] == list(range(9))
    assert whole[7][1] == "7<|im_end|>"


@pytest.mark.parametrize(
    ("layout", "fields", "message"),
    [
        ("text", {"text": 3}, "field 'text' is int, expected a string"),
        ("text", {"text": " \n"}, "field 'text' is empty, so nothing is learned"),
        ("text", {"text": "a\0"}, "field 'text': holds a NUL character at character 1"),
        ("prompt", {"prompt": "a", "completion": ""}, "'completion' is empty"),
        ("prompt", {"prompt": None, "completion": "a"}, "'prompt' is NoneType"),
        ("prompt", {"prompt": TALK, "completion": "a"}, "'prompt' is list"),
        ("prompt", {"prompt": TALK, "completion": TALK[:1]}, "no message with role"),
        ("instruction", {"instruction": "a", "output": []}, "'output' is list"),
        ("instruction", {"instruction": "", "output": "b"}, "'instruction' is empty"),
        ("messages", {"messages": []}, "chat messages: the list is empty"),
        ("messages", {"messages": "Hi"}, "chat messages: got str, expected a list"),
        ("messages", {"messages": [{"role": 1}]}, r"messages\[0\]: expected a dict"),
        ("messages", {"messages": [turn("bot", "a")]}, r"\[0\]: role 'bot', expected"),
        ("messages", {"messages": [turn("user", ["a"])]}, "'content' is list"),
        ("messages", {"messages": [turn("user", None)]}, "'content' is NoneType"),
        ("messages", {"messages": TALK[:2]}, "no message with role 'assistant'"),
        ("messages", {"messages": TALK[2:]}, "starts with an answer"),
        ("messages", {"messages": TALK, "tools": "x"}, "tools is str"),
    ],
)
def test_broken_records(layout, fields, message):
    """The message names the line."""
    with pytest.raises(FormatError, match=rf"^a\.jsonl:1: .*{message}"):
        samples(layout, fields, template=UNMARKED)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "a conversation needs a chat template"),
        ("{{ 1 // 0 }}", "chat template: integer .*by zero"),
        ("{% if %}", "chat template: Expected"),
        ("{{ messages | length }}{{ add_generation_prompt }}", "cannot be told apart"),
        ("{{ messages[0].content }}", "cannot be told apart"),
    ],
)
def test_templates_that_cannot_be_used(template, message):
    with pytest.raises(SpecError, match=rf"^a\.jsonl:1.*: .*{message}"):
        samples("messages", {"messages": TALK}, template=template)


def test_find_template(tmp_path):
    """The tokenizer's own, a name, a source or a file."""
    tokenizer = make_tokenizer()
    assert find_template(None, tokenizer) is None
    tokenizer.chat_templates["default"] = "{{ x }}"
    assert find_template(None, tokenizer) == "{{ x }}"
    assert find_template("chatml", tokenizer) == CHATML
    assert find_template("{{ y }}", tokenizer) == "{{ y }}"
    path = tmp_path / "chat.jinja"
    path.write_text("{{ é }}", "utf-8")
    assert find_template(str(path), tokenizer) == "{{ é }}"
    with pytest.raises(SpecError, match="'chatlm' is neither a file, nor 'chatml'"):
        find_template("chatlm", tokenizer)
    path.write_bytes(b"\xff")
    with pytest.raises(FormatError, match="not UTF-8 at byte 0"):
        find_template(str(path), tokenizer)
    path.write_bytes(b"x" * 70000)
    with pytest.raises(SpecError, match="larger than 65536 bytes"):
        find_template(str(path), tokenizer)

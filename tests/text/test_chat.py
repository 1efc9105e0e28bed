"""Chat templates: what they see, and that nothing they do goes unbounded."""

import time

import pytest

from qjax import chat
from qjax.errors import SpecError

USER = [{"role": "user", "content": "Hello"}]


def test_renders_messages_with_the_usual_helpers():
    """Names, filters, blocks and loop controls of Hugging Face templates work."""
    template = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}\n"
        "{{ m.role }}={{ m['content'] | trim }};{% generation %}x{% endgeneration %}\n"
        "{% endfor %}{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
        '{{ {"a": "<é>"} | tojson }}{{ bos_token }}{{ strftime_now("%Y") | length }}'
    )
    text = chat.render(template, [*USER, *USER], bos_token="<s>")
    assert text == 'user=Hello;x2{"a": "<é>"}<s>4'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "refused by the sandbox"),
        ("{{ cycler.__init__.__globals__ }}", "refused by the sandbox"),
        ("{{ messages.append(1) }}", "refused by the sandbox"),
        ("{{ messages[0].update(a=1) }}", "refused by the sandbox"),
        ("{% set ns = namespace(_a=1) %}", "refused by the sandbox"),
        ("{{ 'a' * 10**11 }}", "bytes of memory"),
        ("{{ 'a' * 10**7 }}", "exceeds 4194304 characters"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% if %}", "Expected an expression"),
        ("{% include 'x' %}", "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("x" * (chat.SOURCE_LIMIT + 1), "65537 bytes of source"),
    ],
)
def test_refuses_with_a_reason(template, message):
    """A template that errs, digs, or grows is an error that says so."""
    with pytest.raises(SpecError, match="chat template") as caught:
        chat.render(template, USER)
    assert message in str(caught.value)


def test_endless_loop_ends():
    """A loop without end is stopped at the deadline, in this process's time."""
    loop = "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4
    start = time.perf_counter()
    with pytest.raises(SpecError, match="did not end by the deadline"):
        chat.render(loop, USER, seconds=1.0)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the list is empty"),
        ("Hello", "got str, expected a list"),
        ([{"content": "x"}], r"messages\[0\]: expected a dict with a string 'role'"),
        ([{"role": "user", "content": object()}], r"\['content'\]: got object"),
        ([{"role": "user", "content": {1: 2}}], "key 1 is not a string"),
    ],
)
def test_inputs_are_plain(messages, message):
    """Only plain JSON values reach a template."""
    with pytest.raises(SpecError, match=message):
        chat.render("x", messages)


def test_many_conversations_with_spans():
    """One process renders all; spans are those of the generation blocks alone."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% set said %}"
        "{% generation %}{{ m.content }}.{% endgeneration %}{% endset %}[{{ said }}]"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}{{ strftime_now('%Y') }}"
    )
    talk = [*USER, {"role": "assistant", "content": "Hé <|x|>"}]
    requests = [{"messages": talk * 2}, {"messages": USER}]
    two, none = chat.render_many(template, requests, spans=True, now="1999-01-01")
    assert two.text == "Hello[Hé <|x|>.]Hello[Hé <|x|>.]1999"
    assert [two.text[a:b] for a, b in two.spans] == ["Hé <|x|>."] * 2
    assert none == ("Hello1999", ())
    plain = chat.render_many(template, requests, now="1999-01-01")
    assert plain == [(two.text, ()), none]
    assert chat.render_many(template, []) == []


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 // messages }}", "b: chat template: integer .*by zero"),
        ("{{ 'a' * messages * 10**7 }}", "b: chat template: .*4194304 characters"),
        ("{{ 'a' * (4 * 10**6 + messages) }}", "i: chat template: the texts so far"),
        ("{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4, "a to i: chat temp"),
    ],
)
def test_many_conversations_name_the_one_that_fails(template, message):
    """The name is that of the request; of all where none can be told."""
    values = [1, 0] + [1] * 7 if "//" in template else [0, 1] + [0] * 7
    requests = [{"messages": value} for value in values]
    with pytest.raises(SpecError, match=message):
        chat.render_many(template, requests, seconds=1.0, names="abcdefghi")

"""Chat templates and BOS handling against transformers."""

import json
import shutil

import pytest

from qjax.text import load_tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}{{- "<|eot_id|>" }}
{%- if tools is not none %}{% for t in tools %}{{- t | tojson(indent=4) }}{% endfor %}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != "
    "'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System "
    "role not supported') }}{% endif %}{% for message in messages %}{% if "
    "(message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
    "'Conversation roles must alternate user/assistant/...') }}{% endif %}{% if ("
    "message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = "
    "message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' + "
    "message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}{% if "
    "add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
MISTRAL = """{%- set loop_messages = messages %}
{{- bos_token }}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {%- generation %}
        {{- ' ' + message['content'].rstrip() + eos_token }}
        {%- endgeneration %}
    {%- else %}{% continue %}
    {%- endif %}
{%- endfor %}
"""
REASONING = """{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == 'assistant' and '</think>' in content %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|' ~ message.role ~ '|>' ~ content ~ (message.get('x') or '') }}
{%- for k, v in message.items() %}{{ k }}{% endfor %}
{%- for m in messages[::-1] %}{{ loop.revindex }}{% endfor %}
{%- endfor %}
"""

CHATS = [
    [{"role": "user", "content": " Hi <b>&amp;</b> \n"}],
    [
        {"role": "user", "content": "Was heißt 1+1?"},
        {"role": "assistant", "content": "<think>hm\n</think>\n2 😀 "},
        {"role": "user", "content": "Why?"},
    ],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ],
]


def write_tokenizer(folder, model_path, **config):
    """Write a tokenizer folder that both libraries read."""
    shutil.copy(model_path / "tokenizer.json", folder)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("template", [LLAMA3, CHATML, GEMMA, MISTRAL, REASONING])
@pytest.mark.parametrize("generation", [True, False])
def test_chat_templates_render_as_in_transformers(
    tmp_path, model_path, template, generation
):
    """The same text, or an error in both, for every conversation."""
    write_tokenizer(tmp_path, model_path, chat_template=template)
    ours = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for chat in CHATS:
        for tools in (None, [{"name": "f", "parameters": {"x": ["<é>", 1.5]}}]):

            def render(tokenizer, chat=chat, tools=tools, **kwargs):
                try:
                    return tokenizer.apply_chat_template(
                        chat, tools=tools, add_generation_prompt=generation, **kwargs
                    )
                except Exception:
                    return None

            assert render(ours) == render(theirs, tokenize=False)


def test_bundled_tokenizer_agrees(model_path, books_text):
    """Ids and text of the bundled tokenizer equal transformers'."""
    ours = load_tokenizer(model_path)
    theirs = transformers.AutoTokenizer.from_pretrained(model_path)
    text = books_text[:20_000] + " naïve 😀\t\n  x<|im_end|>"
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.eos_id, ours.bos_id) == (theirs.eos_token_id, theirs.bos_token_id)


def test_sentencepiece_only_folders_convert(tmp_path, calibration_text):
    """A folder with only `tokenizer.model` gives sentencepiece's own ids."""
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(calibration_text[:20_000].splitlines()),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",'
        '"unk_token": "<unk>", "add_bos_token": true}'
    )
    ours = load_tokenizer(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor()
    theirs.Load(str(tmp_path / "tokenizer.model"))
    for text in ("It was the best of times", "naïve  😀 x", "a\nb"):
        assert ours.encode(text) == [1, *theirs.encode(text)]
        assert ours.decode(ours.encode(text)) == text

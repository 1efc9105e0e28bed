"""The tokenizer wrapper: ids, special tokens, streaming, bad files."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from qjax.errors import (
    FormatError,
    MissingExtraError,
    SpecError,
    UnsupportedError,
)
from qjax.text import Tokenizer, load_tokenizer
from tests.byte_tokenizer import CONFIG, make_backend


def test_special_tokens():
    """Ids come from the config; end ids also from the generation config."""
    tokenizer = Tokenizer(
        make_backend(), config=CONFIG, generation_config={"eos_token_id": [257, 3]}
    )
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (256, 257, 257)
    assert tokenizer.eos_ids == (257, 3)
    assert tokenizer.vocab_size == 258


@pytest.mark.parametrize(
    ("post", "setting", "adds"),
    [
        (False, None, False),
        (True, None, True),
        (True, False, False),
        (False, True, True),
    ],
)
def test_bos_policy(post, setting, adds):
    """The explicit setting decides, else the post-processor; EOS is never added."""
    config = CONFIG if setting is None else CONFIG | {"add_bos_token": setting}
    tokenizer = Tokenizer(make_backend(post), config=config)
    assert tokenizer.adds_bos is adds
    ids = tokenizer.encode("ab")
    assert ids == [256] * adds + tokenizer.encode("ab", add_special_tokens=False)
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.encode("") == [256] * adds


def test_stream_never_shows_half_a_character():
    """Pieces join to the text; characters of up to 4 bytes arrive whole."""
    tokenizer = Tokenizer(make_backend(), config=CONFIG)
    text = "aé€😀 b👩‍🚀 ü"
    stream = tokenizer.stream(tokenizer.encode("x"))
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + stream.finish() == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert [piece for piece in pieces if piece][:4] == ["a", "é", "€", "😀"]


def test_stream_of_broken_bytes_ends():
    """Bytes that never form a character come out as U+FFFD, not never."""
    tokenizer = Tokenizer(make_backend(), config=CONFIG)
    lead = tokenizer.encode("€")[:1]
    stream = tokenizer.stream()
    text = "".join(stream.push(token) for token in lead * 20) + stream.finish()
    assert text == "\ufffd" * 20
    stream = tokenizer.stream()
    assert stream.push(lead[0]) == ""
    assert stream.finish() == "\ufffd"


def test_stream_keeps_the_space_of_a_first_word():
    """A decoder that strips the leading space still separates prompt and answer."""
    vocab = {"<unk>": 0, "▁once": 1, "▁upon": 2}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(backend)
    assert tokenizer.decode([2]) == "upon"
    assert tokenizer.stream([1]).push(2) == " upon"


def test_check_vocab():
    """A tokenizer larger than the model is refused with both sizes."""
    tokenizer = Tokenizer(make_backend())
    tokenizer.check_vocab(258)
    with pytest.raises(SpecError, match="has 258 ids, but the model's vocabulary is 9"):
        tokenizer.check_vocab(9)


def test_encode_refuses_what_is_no_text():
    """Bytes and lone surrogates are named, not passed on."""
    tokenizer = Tokenizer(make_backend())
    with pytest.raises(SpecError, match="got bytes, expected str"):
        tokenizer.encode(b"x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(SpecError, match="not valid Unicode"):
        tokenizer.encode("a\ud800")


def test_load_reads_the_folder(tmp_path):
    """Every file of the folder is used; a template file wins over the config."""
    make_backend(True).save(str(tmp_path / "tokenizer.json"))
    write = lambda name, value: (tmp_path / name).write_text(json.dumps(value))  # noqa: E731
    write("special_tokens_map.json", CONFIG)
    write("tokenizer_config.json", {"chat_template": "old", "bos_token": "<s>"})
    write("generation_config.json", {"eos_token_id": 5})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == (257, 5)
    assert tokenizer.chat_template == "old"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ x }}")
    tokenizer = load_tokenizer(tmp_path)
    user = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(user, x="!") == "<s>!"


def test_named_templates(tmp_path):
    """A list of templates is kept by name, and tools choose theirs."""
    make_backend().save(str(tmp_path / "tokenizer.json"))
    listed = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools: {{ tools[0].name }}"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": listed})
    )
    tokenizer = load_tokenizer(tmp_path)
    user = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(user) == "plain"
    assert tokenizer.apply_chat_template(user, tools=[{"name": "f"}]) == "tools: f"


def test_no_template_is_an_error():
    """A base model has no template, and the message says what to do."""
    with pytest.raises(SpecError, match="has no chat template"):
        Tokenizer(make_backend()).apply_chat_template([{"role": "user"}])


def test_bad_folders(tmp_path):
    """Missing, damaged and unconvertible tokenizers are named by file."""
    with pytest.raises(SpecError, match="no tokenizer found"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(FormatError, match="not a valid tokenizer"):
        load_tokenizer(tmp_path)
    make_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(FormatError, match="got list, expected an object"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(FormatError, match="not valid JSON"):
        load_tokenizer(tmp_path)


def test_sentencepiece_names_the_missing_package(tmp_path, monkeypatch):
    """Without sentencepiece the error is the line that installs it."""
    (tmp_path / "tokenizer.model").write_bytes(b"garbage")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install sentencepiece protobuf"):
        load_tokenizer(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_unconvertible_tokenizer_names_its_reason(tmp_path):
    """A folder whose legacy tokenizer is garbage says how to go on."""
    (tmp_path / "vocab.json").write_text("garbage")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UnsupportedError, match=r"add tokenizer\.json to the folder"):
        load_tokenizer(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_code_in_the_folder_is_never_run(tmp_path):
    """A tokenizer that only code of its own can load is refused."""
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", null]}}'
    )
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UnsupportedError, match="could not be converted"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()

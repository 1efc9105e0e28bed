"""The files of a tokenizer, read without trusting them.

`tokenizer.json` is read by the `tokenizers` package alone. A folder with only a
SentencePiece `tokenizer.model` (or other legacy files) is converted by transformers,
imported at that moment.

Refuses: files that are no tokenizer, JSON above 16 MB, templates above the limit of
`qjax.chat`, and any code that a model folder brings along.
"""

import dataclasses
import importlib.util
import json
import os
from collections.abc import Mapping
from typing import Any

import tokenizers

from qjax import chat
from qjax.errors import FormatError, MissingExtraError, SpecError, UnsupportedError

_JSON_LIMIT = 16 * 1024 * 1024
_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")
_LEGACY_FILES = (*_SENTENCEPIECE_FILES, "vocab.json", "vocab.txt")


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """What a model folder says about its tokenizer.

    Attributes:
        backend: The tokenizer proper.
        config: `tokenizer_config.json` over `special_tokens_map.json`.
        generation_config: `generation_config.json`.
        chat_templates: Template sources by name.
    """

    backend: tokenizers.Tokenizer
    config: dict[str, Any]
    generation_config: dict[str, Any]
    chat_templates: dict[str, str]


def read_files(directory: str | os.PathLike[str]) -> TokenizerFiles:
    """Read a folder's tokenizer files, as far as they exist.

    Raises:
        FormatError: A file is damaged.
        SpecError: The folder holds no tokenizer.
        MissingExtraError: A legacy tokenizer needs a package that is not installed.
        UnsupportedError: A legacy tokenizer could not be converted.
    """
    folder = os.fspath(directory)
    path = os.path.join(folder, "tokenizer.json")
    if os.path.isfile(path):
        try:
            backend = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the package raises plain Exception
            raise FormatError(f"{path}: not a valid tokenizer: {error}") from None
    elif any(os.path.isfile(os.path.join(folder, name)) for name in _LEGACY_FILES):
        backend = _convert_legacy(folder)
    else:
        raise SpecError(
            f"{folder}: no tokenizer found; expected tokenizer.json or tokenizer.model"
        )
    config = _read_json(folder, "special_tokens_map.json")
    config |= _read_json(folder, "tokenizer_config.json")
    return TokenizerFiles(
        backend,
        config,
        generation_config=_read_json(folder, "generation_config.json"),
        chat_templates=_read_templates(folder, config),
    )


def files_from(contents: Mapping[str, bytes], where: str) -> TokenizerFiles:
    """The same from contents by name, in place of a folder.

    Raises:
        FormatError: A content is damaged.
        SpecError: There is no `tokenizer.json`.
    """
    if "tokenizer.json" not in contents:
        raise SpecError(f"{where}: has no tokenizer")
    try:
        backend = tokenizers.Tokenizer.from_buffer(contents["tokenizer.json"])
    except Exception as error:  # the package raises plain Exception
        raise FormatError(f"{where}: not a valid tokenizer: {error}") from None

    def read(name: str) -> dict[str, Any]:
        return _object(contents.get(name, b"{}"), f"{where}: {name}")

    config = read("special_tokens_map.json") | read("tokenizer_config.json")
    templates = _listed(config)
    if "chat_template.jinja" in contents:
        try:
            templates["default"] = contents["chat_template.jinja"].decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{where}: chat_template.jinja: {error}") from None
    return TokenizerFiles(backend, config, read("generation_config.json"), templates)


def _convert_legacy(folder: str) -> tokenizers.Tokenizer:
    """Convert a slow tokenizer with transformers, never running code from `folder`."""
    sentencepiece = any(
        os.path.isfile(os.path.join(folder, name)) for name in _SENTENCEPIECE_FILES
    )
    if sentencepiece and importlib.util.find_spec("sentencepiece") is None:
        raise MissingExtraError(
            f"{folder}: converting its SentencePiece tokenizer needs a package; run: "
            "pip install sentencepiece protobuf"
        )
    try:
        from transformers import AutoTokenizer

        slow = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        return slow.backend_tokenizer
    except ImportError as error:
        raise MissingExtraError(
            f"{folder}: converting its tokenizer needs a missing package "
            f"({str(error).strip().splitlines()[0]}); run: "
            "pip install transformers sentencepiece protobuf"
        ) from None
    except Exception as error:
        raise UnsupportedError(
            f"{folder}: its tokenizer has no tokenizer.json and could not be converted "
            f"({type(error).__name__}: {_first_line(error)}); convert it once with "
            "transformers and add tokenizer.json to the folder"
        ) from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "no reason given"


def _read_json(folder: str, name: str) -> dict[str, Any]:
    """Return a JSON object, or {} where the file does not exist.

    Laxer than `qjax.io.json`: tokenizers write `model_max_length` as 10^30.
    """
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return {}
    if os.path.getsize(path) > _JSON_LIMIT:
        raise FormatError(f"{path}: larger than {_JSON_LIMIT} bytes")
    with open(path, "rb") as file:
        return _object(file.read(), path)


def _object(raw: bytes, where: str) -> dict[str, Any]:
    """Return a JSON object."""
    try:
        value = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{where}: got {type(value).__name__}, expected an object")
    return value


def _listed(config: Mapping[str, Any]) -> dict[str, str]:
    """Templates of a `tokenizer_config.json` by name."""
    listed = config.get("chat_template")
    if isinstance(listed, str):
        return {"default": listed}
    return {
        str(item.get("name")): item["template"]
        for item in (listed if isinstance(listed, list) else [])
        if isinstance(item, dict) and isinstance(item.get("template"), str)
    }


def _read_templates(folder: str, config: Mapping[str, Any]) -> dict[str, str]:
    """Return template sources by name; a file of its own wins over the config."""
    templates = _listed(config)
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.isfile(path) and os.path.getsize(path) <= chat.SOURCE_LIMIT:
        with open(path, encoding="utf-8") as file:
            templates["default"] = file.read()
    elif os.path.isfile(path):
        raise FormatError(f"{path}: larger than {chat.SOURCE_LIMIT} bytes")
    return templates

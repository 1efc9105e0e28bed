"""Chat templates: messages to the text a model was trained on.

A template comes with a model from a stranger, so it is rendered by `chat_worker` in a
process of its own, sandboxed by jinja2 and bounded in source, output, memory and time.

Costs: about 0.1 s to start the process; `render` is meant for one conversation at a
time, not for a training set.

Refuses: templates above 64 KB, inputs that are not plain JSON values, output above
`OUTPUT_LIMIT` characters, and any rendering that has not ended by the deadline.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from qjax.errors import SpecError

SOURCE_LIMIT = 64 * 1024
OUTPUT_LIMIT = 4 * 1024 * 1024
MEMORY_LIMIT = 1024 * 1024 * 1024
SECONDS = 10.0

_WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "chat_worker.py")


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    seconds: float = SECONDS,
    **variables: Any,
) -> str:
    """Render `messages` with a Hugging Face chat template.

    Args:
        template: Jinja source.
        messages: Dicts with a `role` and a `content`, in order.
        seconds: Deadline of the rendering.
        **variables: Other names the template reads, such as `add_generation_prompt`,
            `bos_token`, `tools`. Plain JSON values.

    Returns:
        The rendered text.

    Raises:
        SpecError: The template or an input is not allowed, the template itself raised,
            or a bound was exceeded.
    """
    if not isinstance(template, str):
        raise SpecError(f"chat template: got {type(template).__name__}, expected str")
    size = len(template.encode("utf-8", "replace"))
    if size > SOURCE_LIMIT:
        raise SpecError(
            f"chat template: {size} bytes of source, at most {SOURCE_LIMIT} are "
            "allowed; use a shorter template"
        )
    check_messages(messages)
    values = {"messages": list(messages), **variables}
    for name, value in values.items():
        _check_plain(value, name)
    request = {
        "template": template,
        "variables": values,
        "path": _jinja_path(),
        "output_limit": OUTPUT_LIMIT,
        "memory_bytes": MEMORY_LIMIT,
        "seconds": seconds,
    }
    return _answer(_run_worker(request, seconds))


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise SpecError unless `messages` is a non-empty list of dicts with a role."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise SpecError(
            f"chat messages: got {type(messages).__name__}, expected a list such as "
            '[{"role": "user", "content": "Hello"}]'
        )
    if not messages:
        raise SpecError("chat messages: the list is empty; give at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise SpecError(
                f"chat messages[{index}]: expected a dict with a string 'role', got "
                f"{_shorten(message)}"
            )


def _check_plain(value: Any, where: str, depth: int = 0) -> None:
    """Raise SpecError unless `value` is made of plain JSON values."""
    if depth > 32:
        raise SpecError(f"chat input {where}: nested deeper than 32 levels")
    if value is None or type(value) in (str, int, float, bool):
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            if type(key) is not str:
                raise SpecError(
                    f"chat input {where}: key {_shorten(key)} is not a string"
                )
            _check_plain(item, f"{where}[{key!r}]", depth + 1)
        return
    if type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]", depth + 1)
        return
    raise SpecError(
        f"chat input {where}: got {type(value).__name__}, expected plain strings, "
        "numbers, booleans, lists and dicts"
    )


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _jinja_path() -> list[str]:
    """Return the folders that jinja2 and markupsafe are imported from."""
    folders = []
    for name in ("jinja2", "markupsafe"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise SpecError(f"chat template: package {name} is missing; reinstall qjax")
        folders.append(os.path.dirname(os.path.dirname(spec.origin)))
    return sorted(set(folders))


def _run_worker(request: dict[str, Any], seconds: float) -> bytes | None:
    """Return what the worker wrote, or None where it did not end in time."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-B", _WORKER],
            input=json.dumps(request, default=dict).encode(),
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout if done.returncode == 0 else b""


def _answer(output: bytes | None) -> str:
    """Turn the worker's output into text or a SpecError."""
    if output is None:
        raise SpecError(
            "chat template: rendering did not end by the deadline; the template has "
            "an endless or very long loop"
        )
    if not output:
        raise SpecError(
            "chat template: the rendering process was stopped: the template used too "
            "much memory or processor time"
        )
    answer = json.loads(output)
    if "text" in answer:
        return answer["text"]
    kind, message = answer["error"], answer["message"]
    if kind == "output":
        raise SpecError(
            f"chat template: the rendered text exceeds {OUTPUT_LIMIT} characters"
        )
    if kind == "memory":
        raise SpecError(
            f"chat template: rendering needs more than {MEMORY_LIMIT} bytes of memory"
        )
    if kind == "SecurityError":
        raise SpecError(f"chat template: refused by the sandbox: {message}")
    raise SpecError(f"chat template: {message or kind}")

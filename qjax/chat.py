"""Chat templates: messages to the text a model was trained on.

A template comes with a model from a stranger, so it is rendered by `chat_worker` in a
process of its own, sandboxed by jinja2 and bounded in source, output, memory and time.

Costs: about 0.1 s to start the process, for one conversation (`render`) or for a part
of a training set (`render_many`).

Refuses: templates above 64 KB, inputs that are not plain JSON values, output above
`OUTPUT_LIMIT` characters a conversation and `TOTAL_LIMIT` in all, and any rendering
that has not ended by the deadline.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qjax.errors import SpecError

SOURCE_LIMIT = 64 * 1024
OUTPUT_LIMIT = 4 * 1024 * 1024
TOTAL_LIMIT = 32 * 1024 * 1024
MEMORY_LIMIT = 1024 * 1024 * 1024
SECONDS = 10.0

_WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "chat_worker.py")


class Rendering(NamedTuple):
    """A rendered conversation.

    Attributes:
        text: What the template wrote.
        spans: First character and end of every `{% generation %}` block in it, where
            they were asked for.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


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
    check_messages(messages)
    request = {"messages": list(messages), **variables}
    return render_many(template, [request], seconds=seconds)[0].text


def render_many(
    template: str,
    requests: Sequence[Mapping[str, Any]],
    *,
    seconds: float = SECONDS,
    spans: bool = False,
    now: str | None = None,
    names: Sequence[str] = (),
) -> list[Rendering]:
    """Render many conversations in one process.

    Args:
        template: Jinja source.
        requests: What the template reads, by name, of each; `messages` are not checked.
        seconds: Deadline of all renderings together.
        spans: Find the `{% generation %}` blocks.
        now: Time that `strftime_now` shows, in ISO format; None is the clock's.
        names: What errors call each request.

    Returns:
        One rendering of each request.

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
    for values in requests:
        for name, value in values.items():
            _check_plain(value, name)
    request = {
        "template": template,
        "requests": list(requests),
        "spans": spans,
        "now": now,
        "path": _jinja_path(),
        "output_limit": OUTPUT_LIMIT,
        "total_limit": TOTAL_LIMIT,
        "memory_bytes": MEMORY_LIMIT,
        "seconds": seconds,
    }
    found = _answer(_run_worker(request, seconds), names)
    return [Rendering(text, tuple(map(tuple, marked))) for text, marked in found]


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


def _answer(output: bytes | None, names: Sequence[str]) -> list[Any]:
    """Turn the worker's output into texts with their spans, or a SpecError."""
    where = "chat template"
    if len(names) > 1:
        where = f"{names[0]} to {names[-1]}: chat template"
    if output is None:
        raise SpecError(
            f"{where}: rendering did not end by the deadline; the template has "
            "an endless or very long loop"
        )
    if not output:
        raise SpecError(
            f"{where}: the rendering process was stopped: the template used too "
            "much memory or processor time"
        )
    answer = json.loads(output)
    if "renderings" in answer:
        return answer["renderings"]
    kind, message, index = answer["error"], answer["message"], answer["index"]
    where = f"{names[index]}: chat template" if index < len(names) else "chat template"
    if kind == "output":
        raise SpecError(f"{where}: the rendered text exceeds {OUTPUT_LIMIT} characters")
    if kind == "total":
        raise SpecError(f"{where}: the texts so far exceed {TOTAL_LIMIT} characters")
    if kind == "memory":
        raise SpecError(
            f"{where}: rendering needs more than {MEMORY_LIMIT} bytes of memory"
        )
    if kind == "SecurityError":
        raise SpecError(f"{where}: refused by the sandbox: {message}")
    raise SpecError(f"{where}: {message or kind}")

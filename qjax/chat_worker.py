"""Renders a chat template in a process of its own; run by `qjax.chat`.

Reads one JSON request from standard input and writes one JSON answer to standard
output. It imports neither qjax nor jax, so that it starts quickly, and it is a process
because nothing less can be stopped: a sandbox bounds what a template may touch, but
neither its loops nor its memory.

Decides: the names a template sees (`raise_exception`, `strftime_now`, `tojson`, the
`{% generation %}` block and loop controls, as Hugging Face templates expect).
Refuses: private attributes, changing its inputs, and more output, memory or processor
time than the request allows.
"""

import json
import re
import secrets
import sys
from datetime import datetime


def limit_resources(memory_bytes, seconds):
    """Cap this process's address space and processor time, where the system can."""
    try:
        import resource
    except ImportError:  # Windows: the deadline of the parent remains
        return
    for kind, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, int(seconds) + 1),
    ):
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):  # a lower limit is already in force
            continue


def make_extension():
    """Return the extension that renders `{% generation %}` blocks as their body.

    The environment's `marks`, where it has them, are written around the body.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        """Marks what the assistant says, for training."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            if marks := getattr(self.environment, "marks", None):
                first, last = (
                    nodes.Output([nodes.TemplateData(mark)]) for mark in marks
                )
                body = [first, *body, last]
            return nodes.Scope(body).set_lineno(line)

    return Generation


def make_namespace():
    """Return a `namespace` that holds no private names."""
    import jinja2

    def check(name):
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"private name {name!r}")

    class Namespace(jinja2.utils.Namespace):
        """Variables that survive the end of a loop's body."""

        def __init__(self, /, *args, **kwargs):
            values = dict(*args, **kwargs)
            for name in values:
                check(name)
            super().__init__(values)

        def __setitem__(self, name, value):
            check(name)
            super().__setitem__(name, value)

    return Namespace


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Return JSON as Hugging Face templates expect it: no HTML escapes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def build_environment(marks, now):
    """Return the sandboxed environment chat templates are compiled in.

    `marks`, a pair of strings or None, surround what the assistant says; `now` is the
    time that templates see, or None for the clock's.
    """
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(str(message))

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[make_extension(), loopcontrols],
    )
    environment.extend(marks=marks)
    environment.filters["tojson"] = tojson
    fixed = None if now is None else datetime.fromisoformat(now)
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda form: (fixed or datetime.now()).strftime(form),
        namespace=make_namespace(),
        dict=lambda *args, **kwargs: dict(*args, **kwargs),
    )
    return environment


def split_marks(text, marks):
    """Return `text` without marks, and first character and end of what they enclose."""
    pieces, spans, size, start = [], [], 0, 0
    for piece in re.split("(" + "|".join(map(re.escape, marks)) + ")", text):
        if piece == marks[0]:
            start = size
        elif piece == marks[1]:
            spans.append((start, size))
        else:
            pieces.append(piece)
            size += len(piece)
    return "".join(pieces), spans


def render(request):
    """Return the answer to `request`: texts, or the kind and words of an error."""
    marks = None
    if request["spans"]:  # random, so that no message can hold them
        marks = [f"<{secrets.token_hex(16)}>" for _ in range(2)]
    environment = build_environment(marks, request["now"])
    limit_resources(request["memory_bytes"], request["seconds"])
    renderings, total, index = [], 0, 0
    try:
        template = environment.from_string(request["template"])
        for index, variables in enumerate(request["requests"]):
            pieces, size = [], 0
            for piece in template.generate(**variables):
                size += len(piece)
                if size > request["output_limit"]:
                    return {"error": "output", "message": "", "index": index}
                pieces.append(piece)
            total += size
            if total > request["total_limit"]:
                return {"error": "total", "message": "", "index": index}
            text = "".join(pieces)
            renderings.append(split_marks(text, marks) if marks else (text, ()))
    except MemoryError:
        return {"error": "memory", "message": "", "index": index}
    except Exception as error:
        message = str(error)[:2000]
        return {"error": type(error).__name__, "message": message, "index": index}
    return {"renderings": renderings}


def main():
    """Answer the request on standard input."""
    request = json.load(sys.stdin)
    sys.path.extend(request["path"])
    json.dump(render(request), sys.stdout)


if __name__ == "__main__":
    main()

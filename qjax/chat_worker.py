"""Renders one chat template in a process of its own; run by `qjax.chat`.

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
    """Return the extension that renders `{% generation %}` blocks as their body."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        """Marks what the assistant says, for training; nothing to do here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
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


def build_environment():
    """Return the sandboxed environment chat templates are compiled in."""
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
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda form: datetime.now().strftime(form),
        namespace=make_namespace(),
        dict=lambda *args, **kwargs: dict(*args, **kwargs),
    )
    return environment


def render(request):
    """Return the answer to `request`: its text, or the kind and words of an error."""
    environment = build_environment()
    limit_resources(request["memory_bytes"], request["seconds"])
    pieces, size = [], 0
    try:
        template = environment.from_string(request["template"])
        for piece in template.generate(**request["variables"]):
            size += len(piece)
            if size > request["output_limit"]:
                return {"error": "output", "message": ""}
            pieces.append(piece)
    except MemoryError:
        return {"error": "memory", "message": ""}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)[:2000]}
    return {"text": "".join(pieces)}


def main():
    """Answer the request on standard input."""
    request = json.load(sys.stdin)
    sys.path.extend(request["path"])
    json.dump(render(request), sys.stdout)


if __name__ == "__main__":
    main()

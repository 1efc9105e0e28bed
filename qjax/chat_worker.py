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


def build_environment():
    """Return the sandboxed environment chat templates are compiled in."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Renders `{% generation %}...{% endgeneration %}` as its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Namespace(jinja2.utils.Namespace):
        """A namespace that holds no private names."""

        def __init__(self, /, *args, **kwargs):
            values = dict(*args, **kwargs)
            for name in values:
                check_name(name)
            super().__init__(values)

        def __setitem__(self, name, value):
            check_name(name)
            super().__setitem__(name, value)

    def check_name(name):
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"private name {name!r}")

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(str(message))

    def tojson(
        value, ensure_ascii=False, indent=None, separators=None, sort_keys=False
    ):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda form: datetime.now().strftime(form),
        namespace=Namespace,
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

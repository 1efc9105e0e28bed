"""Which tensor gets which format and method.

A `Recipe` is an ordered list of rules; the first rule whose pattern matches a
parameter's dotted path decides. Patterns are shell globs over the whole path (`*`
matches anything, dots included), or regular expressions after `re:`. Recipes are plain
data: they go into artifacts and come back as JSON.

Presets are recipes with names. Their rules quantize every `kernel`, and keep embeddings
and the head, which is what published results for these names do.
"""

import dataclasses
import difflib
import fnmatch
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qjax.errors import SpecError
from qjax.formats import (
    FP4,
    FP8,
    MXFP4,
    MXFP8,
    NF4,
    NVFP4,
    Additive,
    Cast,
    Format,
    Int,
    KMeans,
    Trellis,
    format_from_dict,
)
from qjax.methods import (
    AQLM,
    AWQ,
    GPTAQ,
    GPTQ,
    HQQ,
    LDLQ,
    RTN,
    LLMInt8,
    Lloyd,
    Method,
    Qronos,
    Rotate,
    RoundInputs,
    SignRound,
    SmoothQuant,
    SpQR,
    TrellisLDLQ,
    method_from_dict,
)

_METHODS: dict[str, Method] = {
    "rtn": RTN(),
    "hqq": HQQ(),
    "gptq": GPTQ(act_order="group", range="hessian"),
    "gptaq": GPTAQ(act_order="group", range="hessian"),
    "qronos": Qronos(act_order="group", range="hessian"),
    "ldlq": LDLQ(),
    "awq": AWQ(),
    "signround": SignRound(),
    "rotated": Rotate(GPTQ(act_order="group", range="hessian")),
}
_NAMED = re.compile(r"(?:(\w+)-)?int([1-8])(?:-g(\d+))?(-asym|-sym)?")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a recipe.

    Attributes:
      pattern: glob over the dotted path, or `re:` and a regular expression that must
        match the whole path.
      format: the number format, or None to keep the tensor as it is.
      method: how codes are chosen.

    Raises:
      SpecError: the regular expression does not compile.
    """

    pattern: str
    format: Format | None
    method: Method = dataclasses.field(default_factory=RTN)

    def __post_init__(self) -> None:
        if self.pattern.startswith("re:"):
            try:
                re.compile(self.pattern[3:])
            except re.error as error:
                raise SpecError(f"recipe pattern {self.pattern!r}: {error}") from None

    def matches(self, path: str) -> bool:
        """Whether the rule applies to a parameter path."""
        if self.pattern.startswith("re:"):
            return re.fullmatch(self.pattern[3:], path) is not None
        return fnmatch.fnmatchcase(path, self.pattern)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        if self.format is None:
            return {"pattern": self.pattern, "keep": True}
        return {
            "pattern": self.pattern,
            "format": self.format.to_dict(),
            "method": self.method.to_dict(),
        }


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Ordered rules; tensors that no rule matches, and vectors, are kept.

    Attributes:
      rules: first match decides.
      name: what reports call the recipe.
      rotate: seed of random rotations of the residual stream and of value heads, which
        are folded into the weights before anything is quantized, or None; see
        `qjax.models.rotate`. For models with RMS norms.
      mixture: a preset of llama.cpp, such as `Q4_K_M`, whose types depend on the model:
        when a model is quantized, rules for every matrix take its place. Or None.
      best: whether blocks of `mixture` are better than llama.cpp's; see `GGML`.
    """

    rules: tuple[Rule, ...]
    name: str = "custom"
    rotate: int | None = None
    mixture: str | None = None
    best: bool = False

    def match(self, path: str, shape: Sequence[int]) -> Rule | None:
        """The deciding rule of a tensor, or None when it is kept.

        Args:
          path: dotted parameter path, such as `layers.3.attn.q.kernel`.
          shape: its shape; tensors of rank below 2 are always kept.
        """
        if len(shape) < 2:
            return None
        rule = next((r for r in self.rules if r.matches(path)), None)
        return None if rule is None or rule.format is None else rule

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `recipe_from_dict` is the inverse."""
        spec = {"name": self.name, "rules": [rule.to_dict() for rule in self.rules]}
        more = {"rotate": self.rotate, "mixture": self.mixture}
        more["best"] = self.best or None
        return spec | {k: v for k, v in more.items() if v is not None}


def recipe_from_dict(spec: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Builds a recipe from `Recipe.to_dict()` output or a hand-written equivalent.

    Args:
      spec: `{"name": ..., "rules": [{"pattern", "format" | "keep", "method"?}, ...]}`
        and optionally `"rotate"`, `"mixture"` and `"best"`.
        A format or method may be a preset name (`"int4-g128"`, `"hqq"`).
      where: what errors call the source.

    Raises:
      SpecError: a field is missing, unknown or of the wrong type.
    """
    rules = spec.get("rules")
    fields = {"name", "rules", "rotate", "mixture", "best"}
    if not isinstance(rules, list | tuple) or set(spec) - fields:
        raise SpecError(
            f'{where}: expected {{"name": ..., "rules": [...]}}, got {sorted(spec)}'
        )
    parsed = tuple(_rule(rule, f"{where}, rule {i}") for i, rule in enumerate(rules))
    rotate = spec.get("rotate")
    if rotate is not None and (type(rotate) is not int or rotate < 0):
        raise SpecError(
            f"{where}: rotate is {rotate!r}, expected the seed of random rotations, an "
            "integer from 0 on, or nothing"
        )
    mixture = spec.get("mixture")
    if mixture is not None and mixture not in LLAMA_CPP:
        raise SpecError(
            f"{where}: mixture is {mixture!r:.100}, expected one of "
            f"{', '.join(LLAMA_CPP)}, or nothing"
        )
    best = spec.get("best", False)
    if type(best) is not bool or best > (mixture is not None):
        raise SpecError(
            f"{where}: best is {best!r:.100}, expected true with a mixture or nothing"
        )
    return Recipe(parsed, str(spec.get("name", "custom")), rotate, mixture, best)


def _rule(spec: Any, where: str) -> Rule:
    if not isinstance(spec, Mapping) or not isinstance(spec.get("pattern"), str):
        raise SpecError(f"{where}: expected an object with a pattern, got {spec!r}")
    if unknown := sorted(set(spec) - {"pattern", "format", "method", "keep"}):
        raise SpecError(f"{where}: unknown fields {unknown}")
    if spec.get("keep"):
        return Rule(spec["pattern"], None)
    if "format" not in spec:
        raise SpecError(f'{where}: needs "format" or "keep": true')
    fmt, method = spec["format"], spec.get("method")
    if isinstance(fmt, str):
        rule = preset(fmt).rules[-1]
        fmt, default = rule.format, rule.method
    else:
        fmt, default = format_from_dict(fmt), RTN()
    if isinstance(method, str):
        if method not in _METHODS:
            raise SpecError(f"{where}: unknown method {method!r}; {_known(_METHODS)}")
        method = _METHODS[method]
    elif method is not None:
        method = method_from_dict(method)
    return Rule(spec["pattern"], fmt, method or default)


_ENDS = (
    Rule("*embed*", None),
    Rule("re:(.*\\.)?(head|lm_head)(\\..*)?", None),
)


def _keep_ends(fmt: Format, method: Method, name: str) -> Recipe:
    return Recipe((*_ENDS, Rule("*kernel", fmt, method)), name)


def _best(bits: int, name: str) -> Recipe:
    """Trellis codes; a bit more where errors cost most for each weight.

    Query, key, value and down take two fifths of the weights of a gated block.
    """
    method = TrellisLDLQ()
    more = ("*attn.q.kernel", "*attn.k.kernel", "*attn.v.kernel", "*mlp.down.kernel")
    raised = (Rule(pattern, Trellis(bits + 1), method) for pattern in more)
    return Recipe((*_ENDS, *raised, Rule("*kernel", Trellis(bits), method)), name)


def _int(bits: int, group: int | str, symmetric: bool = False) -> Int:
    """The integer format of presets: 16-bit scales; 8-bit integer or real zeros."""
    return Int(
        bits, group, symmetric=symmetric, scale_dtype="float16", zero_dtype="float16"
    )


PRESETS: dict[str, tuple[Format, Method]] = {
    "bfloat16": (Cast("bfloat16"), RTN()),
    "float16": (Cast("float16"), RTN()),
    "int8": (Int(8, "channel"), RTN()),
    "int4-g128": (_int(4, 128), RTN("mse")),
    "int4-g64": (_int(4, 64), RTN("mse")),
    "int3-g64": (_int(3, 64), RTN("mse")),
    "int2-g64": (_int(2, 64), RTN("mse")),
    "nf4": (NF4(block=64, double=True), RTN()),
    "fp4": (FP4(block=64, double=True), RTN()),
    "fp8": (FP8("e4m3", "channel"), RTN()),
    "mxfp4": (MXFP4(), RTN("mse")),
    "mxfp8": (MXFP8(), RTN()),
    "nvfp4": (NVFP4(), RTN("mse")),
    "w8a8": (Int(8, "channel"), SmoothQuant(RoundInputs())),
    "w8a8-static": (Int(8, "channel"), SmoothQuant(RoundInputs(static=True))),
    "llm-int8": (Int(8, "channel"), LLMInt8(inner=RoundInputs())),
    "hqq-int4-g64": (_int(4, 64), HQQ()),
    "hqq-int3-g64": (_int(3, 64), HQQ()),
    "hqq-int2-g64": (_int(2, 64), HQQ()),
    "gptq-int4-g128": (_int(4, 128), _METHODS["gptq"]),
    "gptq-int3-g64": (_int(3, 64), _METHODS["gptq"]),
    "gptq-int2-g64": (_int(2, 64), _METHODS["gptq"]),
    "awq-int4-g128": (_int(4, 128), AWQ()),
    "awq-int3-g64": (_int(3, 64), AWQ()),
    "spqr-4bit": (Int(4, 32, symmetric=False), SpQR(outliers=0.003)),
    "spqr-3bit": (Int(3, 16, symmetric=False), SpQR()),
    "kmeans-4bit": (KMeans(4), Lloyd(outliers=0.004, sensitive=0.0005)),
    "kmeans-3bit": (KMeans(3), Lloyd(outliers=0.004, sensitive=0.0005)),
    "aqlm-2bit": (Additive(2, 8, 8), AQLM()),
    "trellis-4bit": (Trellis(4), TrellisLDLQ()),
    "trellis-3bit": (Trellis(3), TrellisLDLQ()),
    "trellis-2bit": (Trellis(2), TrellisLDLQ()),
}
"""Named presets: format and method of every kernel."""

BEST: dict[str, Recipe] = {
    f"best-{bits}bit": _best(bits, f"best-{bits}bit") for bits in (2, 3, 4)
}
"""The least perplexity under half a bit more than their name says, on average."""


LLAMA_CPP = (
    *("Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S"),
    *("Q5_K_M", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS"),
    *("IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS"),
)
"""Presets of llama.cpp, in lower or upper case: embeddings and head are quantized too.

Those with IQ need calibration, which the others use as an importance matrix."""


def preset(name: str) -> Recipe:
    """The recipe of a preset name, or of any `METHOD-intB-gG[-sym]` combination.

    Args:
      name: a key of `PRESETS`, one of `LLAMA_CPP`, such as `q4_k_m`, or with `-best`
        behind it for better blocks; or for example `hqq-int5-g32`, `rtn-int4`.

    Raises:
      SpecError: unknown name; the message lists near matches.

    Example:
      >>> preset("hqq-int3-g64").rules[-1].format.bits
      3
    """
    if name in BEST:
        return BEST[name]
    mixture = name.upper().removesuffix("-BEST")
    if mixture in LLAMA_CPP:
        return Recipe((), name, mixture=mixture, best=mixture != name.upper())
    if name in PRESETS:
        return _keep_ends(*PRESETS[name], name)
    found = _NAMED.fullmatch(name)
    if found and (found[1] is None or found[1] in _METHODS):
        group = int(found[3]) if found[3] else "channel"
        fmt = _int(int(found[2]), group, symmetric=found[4] == "-sym")
        method = _METHODS[found[1]] if found[1] else RTN("mse")
        return _keep_ends(fmt, method, name)
    every = [*PRESETS, *BEST, *map(str.lower, LLAMA_CPP)]
    better = [f"{own.lower()}-best" for own in LLAMA_CPP]
    near = difflib.get_close_matches(name, [*every, *better], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    known = f"known: {', '.join(every)}, those of llama.cpp also with -best"
    raise SpecError(
        f"unknown recipe {name!r}: {hint}{known}, any METHOD-intB-gG with "
        f"METHOD one of {', '.join(_METHODS)}, or the path of a JSON recipe"
    )


def load_recipe(recipe: "Recipe | Format | str | os.PathLike[str]") -> Recipe:
    """A recipe from a recipe, a format, a preset name or the path of a JSON file.

    Raises:
      SpecError: unknown preset, or a file that is not a recipe.
      FormatError: the file is not valid JSON.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Format):
        return _keep_ends(recipe, RTN(), recipe.name)
    text = os.fspath(recipe)
    if text.endswith(".json") or Path(text).is_file():
        from qjax.io.json import read_object

        return recipe_from_dict(read_object(text), text)
    return preset(text)


def _known(names: Mapping[str, Any]) -> str:
    return f"known: {', '.join(names)}"

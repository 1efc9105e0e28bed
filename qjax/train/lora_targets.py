"""Which weights of a model adapters go on, by the names they are known by.

A target is matched as PEFT does, with our paths or the checkpoint's names: a list by
whole names or their ends, a string as a regular expression of the whole name.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qjax.errors import SpecError, UnsupportedError
from qjax.train.lora_sites import Site

ALL_LINEAR = "all-linear"
Names = Mapping[str, tuple[str, ...]]
"""All names of a weight, by our path."""


class Targets:
    """The weights that settings name.

    Args:
      found: `sites` of the model.
      targets: `"all-linear"`, a regular expression, or names.
      exclude: Names, or a regular expression, of weights to leave out.

    Attributes:
      chosen: Paths to adapt.
      kept: Paths that are left as they are, and why.

    Raises:
      SpecError: A target or an exclusion names nothing; nothing is left.
      UnsupportedError: A target names a layer that cannot have an adapter.
    """

    def __init__(
        self,
        found: Sequence[Site],
        targets: str | Sequence[str],
        exclude: str | Sequence[str] = (),
    ):
        every = self._names = {
            path: (path, *names)
            for site in found
            for path, names in zip(site.paths, site.names, strict=True)
        }
        unfit = {path: site.reason for site in found for path in site.paths}
        if targets == ALL_LINEAR:
            linear = [s for s in found if not (s.embedding or s.head or s.reason)]
            wanted = {path for site in linear for path in site.paths}
        else:
            wanted = matching("targets", targets, every)
        left = matching("exclude", exclude, every) if exclude else set()
        self.chosen = tuple(path for path in every if path in wanted - left)
        self.kept = {
            path: "excluded" if path in left else unfit[path] or "not a target"
            for path in every
            if path not in self.chosen
        }
        for path in self.chosen:
            if unfit[path]:
                raise UnsupportedError(
                    f"{path}: {unfit[path]}; leave it out of the targets"
                )
        if not self.chosen:
            raise SpecError(
                f"LoRA: targets={targets!r} without exclude={exclude!r} leave "
                f"nothing to adapt in this model; it has {_few(self.kept.items())}"
            )

    def setting(self, label: str, patterns: Mapping[str, Any], default: Any) -> dict:
        """What `rank_pattern` or `alpha_pattern` says, by path of a chosen weight.

        The first pattern that fits the end of a name counts, as in PEFT.

        Raises:
          SpecError: A pattern fits no chosen weight.
        """
        rules = {p: compiled(label, rf"(.*\.)?({p})$") for p in patterns}
        own = {path: self._names[path] for path in self.chosen}
        for pattern, rule in rules.items():
            if not any(map(rule.match, (n for names in own.values() for n in names))):
                raise SpecError(
                    f"LoRA: {label} has {pattern!r}, which fits no adapted weight; did "
                    f"you mean {_near(pattern, own)}?"
                )
        return {
            path: next(
                (patterns[p] for p, rule in rules.items() if any(map(rule.match, all))),
                default,
            )
            for path, all in own.items()
        }


def matching(setting: str, wanted: str | Sequence[str], every: Names) -> set[str]:
    """Paths that a setting names.

    Raises:
      SpecError: It names nothing, or is no regular expression.
    """
    if isinstance(wanted, str) and re.fullmatch(r"[\w.]+", wanted):
        wanted = (wanted,)
    if isinstance(wanted, str):
        pattern = compiled(setting, wanted)
        hits = {p for p, names in every.items() if any(map(pattern.fullmatch, names))}
        if not hits:
            raise SpecError(
                f"LoRA: {setting}={wanted!r}, a regular expression of whole names, "
                f"matches none; did you mean {_near(wanted, every)}? names are "
                f"such as {_few(every.items())}"
            )
        return hits
    hits = set()
    for one in wanted:
        own = {
            path
            for path, names in every.items()
            if any(name == one or name.endswith(f".{one}") for name in names)
        }
        if not own:
            raise SpecError(
                f"LoRA: {setting} names {one!r}, which this model does not have; did "
                f"you mean {_near(one, every)}?"
            )
        hits |= own
    return hits


def compiled(setting: str, pattern: str) -> re.Pattern[str]:
    """A regular expression of a setting.

    Raises:
      SpecError: It is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise SpecError(
            f"LoRA: {setting} has {pattern!r}, which is no regular expression: {error}"
        ) from None


def _near(name: str, every: Names) -> str:
    """Names of the model most like one, for an error."""
    ends = {own.split(".")[-1] for names in every.values() for own in names}
    ends |= {own for names in every.values() for own in names}
    near = difflib.get_close_matches(name, sorted(ends), n=4, cutoff=0.3)
    return ", ".join(map(repr, near or sorted(ends, key=len)[:8]))


def _few(every: Iterable[tuple[str, Any]]) -> str:
    names = [f"{p!r} ({why})" if isinstance(why, str) else repr(p) for p, why in every]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}" or "no layers in it"

"""Settings of adapters, and the report of where they were put."""

import dataclasses
import math
from typing import Any

from qjax.errors import SpecError
from qjax.train.lora_targets import ALL_LINEAR

FROM_WEIGHTS = ("pissa", "loftq")
INITS = ("kaiming", "gaussian", *FROM_WEIGHTS)
VARIANTS = ("lora", "rslora", "dora", "qalora")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Settings of adapters, named as in PEFT.

    Attributes:
      rank: Columns of A.
      alpha: The product has the factor alpha / rank; with `rslora` alpha / sqrt(rank),
        with `qalora` alpha / rank * in / pool.
      variant: `"lora"`, `"rslora"`, `"dora"` or `"qalora"`.
      targets: `"all-linear"`, which leaves out embeddings and head; names or their
        ends, ours (`attn.q`, `layers.3.mlp.down`, `embed`) or the checkpoint's
        (`q_proj`), one or several; any other string is a regular expression of
        whole names.
      exclude: Names to leave out, as `targets`.
      init: `"kaiming"`, `"gaussian"`, `"pissa"` or `"loftq"`.
      dropout: Part of the inputs of A that is dropped in training.
      rank_pattern: Ranks by regular expressions that whole names or their ends match.
      alpha_pattern: The same for alpha.
      pool: Inputs that QA-LoRA averages; the group of the packed weight lets it be
        merged without rounding.
      loftq_rounds: Times that LoftQ quantizes the base anew; 0 keeps it.
      original: The model before it was quantized, which LoftQ needs and PiSSA starts
        from: directory, GGUF file or Hub id, read layer by layer.

    Raises:
      SpecError: A setting is out of range or not a name.
    """

    rank: int = 16
    alpha: float = 16.0
    variant: str = "lora"
    targets: str | tuple[str, ...] = ALL_LINEAR
    exclude: tuple[str, ...] = ()
    init: str = "kaiming"
    dropout: float = 0.0
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    pool: int = 32
    loftq_rounds: int = 0
    original: str | None = None

    def __post_init__(self):
        for name, value, known in (
            ("variant", self.variant, VARIANTS),
            ("init", self.init, INITS),
        ):
            if value not in known:
                raise SpecError(f"LoRA: {name}={value!r}; expected one of {known}")
        for label, rank in (("rank", self.rank), *self.rank_pattern.items()):
            if type(rank) is not int or rank < 1:
                raise SpecError(f"LoRA: rank {rank!r} of {label!r}; expected 1 or more")
        for label, alpha in (("alpha", self.alpha), *self.alpha_pattern.items()):
            if not (isinstance(alpha, int | float) and 0 < alpha < math.inf):
                raise SpecError(
                    f"LoRA: alpha {alpha!r} of {label!r}; expected a positive number"
                )
        if not (isinstance(self.dropout, int | float) and 0.0 <= self.dropout < 1.0):
            raise SpecError(
                f"LoRA: dropout={self.dropout!r}; expected 0 <= dropout < 1"
            )
        for name, least in (("pool", 1), ("loftq_rounds", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise SpecError(f"LoRA: {name}={value!r}; expected {least} or more")
        if self.original is not None and self.init not in FROM_WEIGHTS:
            raise SpecError(
                f"LoRA: original={self.original!r:.80} is what init='loftq' and "
                f"'pissa' start from; init is {self.init!r}: leave one out"
            )
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))
        if isinstance(self.exclude, list):
            object.__setattr__(self, "exclude", tuple(self.exclude))

    def scale(self, rank: int, alpha: float, in_features: int) -> float:
        """The factor of the product of one weight's adapter."""
        if self.variant == "rslora":
            return alpha / math.sqrt(rank)
        pooled = in_features // self.pool if self.variant == "qalora" else 1
        return alpha / rank * pooled


@dataclasses.dataclass(frozen=True)
class AdaptedModule:
    """One weight that has an adapter.

    Attributes:
      path: Its path.
      shape: `[*lead, in, out]`.
      rank: Columns of A.
      alpha: See `LoRA`.
      parameters: Numbers that are trained.
      base: What became of the weight below: `"kept"`, or by `init` `"changed"` (dense)
        or `"requantized"`.
    """

    path: str
    shape: tuple[int, ...]
    rank: int
    alpha: float
    parameters: int
    base: str = "kept"


@dataclasses.dataclass(frozen=True)
class AttachReport:
    """What `attach` did.

    Attributes:
      modules: Weights with adapters.
      kept: Path and reason of every weight without.
    """

    modules: tuple[AdaptedModule, ...]
    kept: tuple[tuple[str, str], ...]

    @property
    def parameters(self) -> int:
        """Numbers that are trained."""
        return sum(one.parameters for one in self.modules)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return {
            "parameters": self.parameters,
            "modules": [dataclasses.asdict(one) for one in self.modules],
            "kept": [{"path": path, "reason": why} for path, why in self.kept],
        }

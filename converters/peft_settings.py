"""What an adapter of PEFT is, and its settings in `adapter_config.json`."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.checks import fits, pattern
from qjax.errors import UnsupportedError
from qjax.models.reader import ConfigReader

_log = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "velora_config",
)
"""Options that change what an adapter computes, and are not computed here."""
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Beginnings of `init_lora_weights` that also change the base model."""
USED = (
    "alpha_pattern",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "init_lora_weights",
    "lora_alpha",
    "modules_to_save",
    "peft_type",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "target_modules",
    "task_type",
    "use_dora",
    "use_qalora",
    "use_rslora",
)
WITHOUT_EFFECT = (
    "auto_mapping",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "revision",
    "runtime_config",
)


@dataclasses.dataclass(frozen=True)
class Factors:
    """The adapter of one layer: `W + scaling * a b`, columns scaled to `magnitude`.

    Attributes:
      a: float `[in / pool, r]`; of embeddings `[vocab, r]`.
      b: float `[r, out]`.
      scaling: what the product is multiplied by.
      magnitude: norm of every column, `[out]`; None without DoRA.
      embedding: whether the layer is a table of embeddings.
      pool: inputs that are averaged before they meet `a` (QA-LoRA).
    """

    a: np.ndarray
    b: np.ndarray
    scaling: float
    magnitude: np.ndarray | None = None
    embedding: bool = False
    pool: int = 1

    @property
    def rank(self) -> int:
        """Columns of `a`."""
        return self.a.shape[1]

    @property
    def inputs(self) -> int:
        """Inputs of the layer."""
        return self.a.shape[0] * self.pool

    @property
    def averages(self) -> int:
        """Number of averages that PEFT multiplies by; 1 without any."""
        return self.a.shape[0] if self.pool > 1 else 1

    def plain(self) -> "Factors":
        """The same without pooling: `a` is `[in, r]`, of float32 if it was pooled."""
        if self.pool == 1:
            return self
        a = np.repeat(np.asarray(self.a, np.float32), self.pool, 0)
        return dataclasses.replace(self, a=a / np.float32(self.pool), pool=1)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter, in the order of kernels, by names of layers as in its file.

    Attributes:
      layers: factors by name of the layer, such as `model.layers.0.self_attn.q_proj`.
      saved: whole tensors that replace those of the base model, by name.
      base: tensors of the base itself, which both ends of a tied model see.
      r: rank of layers that `rank_pattern` does not name.
      alpha: the same of scales; see the module's header.
      rank_pattern: ranks by regular expression.
      alpha_pattern: the same.
      use_rslora: whether scales are `alpha / sqrt(r)`.
      use_dora: whether layers have magnitudes.
      target_modules: ends of layers' names, a regular expression, or None.
      modules_to_save: ends of names of modules that are stored whole.
      bias: `"none"`, `"all"` or `"lora_only"`: biases that are stored.
      ensure_weight_tying: whether PEFT gives a tied head the embedding's adapter; it
        is stored for both.
      fan_in_fan_out: whether the base stores weights `[in, out]` (GPT-2).
      pool: inputs that QA-LoRA averages; 1 for other adapters. Factors of layers have
        the number of averages in their scale, which PEFT multiplies by.
      base_model: name of the base model, or None.
      task_type: what PEFT calls the kind of model.
      trained_over: digest of the recipe of the base it was trained over, if that
        changed what layers are given; see `recipe_digest`.
    """

    layers: Mapping[str, Factors]
    saved: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    base: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    r: int = 8
    alpha: float = 8
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: tuple[str, ...] | str | None = None
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    ensure_weight_tying: bool = False
    fan_in_fan_out: bool = False
    pool: int = 1
    base_model: str | None = None
    task_type: str | None = "CAUSAL_LM"
    trained_over: str | None = None

    def rank_and_scaling(self, name: str, rows: int = 1) -> tuple[int, float]:
        """Rank and scale that the settings give a layer.

        Args:
          name: of the layer.
          rows: of its `a`, which QA-LoRA multiplies by.
        """
        rank = _by_pattern(self.rank_pattern, name, self.r)
        alpha = _by_pattern(self.alpha_pattern, name, self.alpha)
        scaling = alpha / (math.sqrt(rank) if self.use_rslora else rank)
        return rank, scaling * (rows if self.pool > 1 else 1)


def _by_pattern(values: Mapping[str, Any], name: str, usual: Any) -> Any:
    for text, value in values.items():
        ends = pattern(rf"(.*\.)?({text})$", CONFIG)
        if fits(ends, name, CONFIG):
            return value
    return usual


def adapter_of(data: Mapping[str, Any], where: str) -> Adapter:
    """The adapter without its arrays."""
    reader = ConfigReader(data, where)
    if (kind := reader.text("peft_type")) != "LORA":
        raise UnsupportedError(
            f"{where}: peft_type {kind!r:.80} is not read, only LORA"
        )
    if refused := [key for key in REFUSED if data.get(key)]:
        raise UnsupportedError(
            f"{where}: {', '.join(refused)} changes what the adapter computes and is "
            "not supported; merge the adapter with PEFT first"
        )
    known = {*USED, *WITHOUT_EFFECT, *REFUSED}
    if unknown := sorted(ascii(k)[1:81] for k in data.keys() - known if data[k]):
        _log.warning("%s: settings not known here: %s", where, ", ".join(unknown[:9]))
    start = str(data.get("init_lora_weights")).lower()
    if start.startswith(CHANGES_BASE):
        _log.warning(
            "%s: init_lora_weights %.40r changed the base model as well; load the "
            "adapter over that base, or convert it to a plain one with PEFT",
            where,
            start,
        )
    pool = 1
    if reader.flag("use_qalora", default=False):
        pool = reader.integer("qalora_group_size", default=16, low=2, high=1 << 16)
        if reader.flag("use_dora", default=False):
            raise UnsupportedError(
                f"{where}: use_qalora with use_dora is not read; PEFT does not compute "
                "it either"
            )
    bias = reader.text("bias", default="none")
    if bias not in ("none", "all", "lora_only"):
        raise reader.bad("bias", bias, "none, all or lora_only")
    return Adapter(
        {},
        r=reader.integer("r", default=8, high=1 << 16),
        alpha=reader.number("lora_alpha", default=8),
        rank_pattern=_patterns(reader, "rank_pattern"),
        alpha_pattern=_patterns(reader, "alpha_pattern"),
        use_rslora=reader.flag("use_rslora", default=False),
        use_dora=reader.flag("use_dora", default=False),
        target_modules=_names(reader, "target_modules", text=True) or None,
        modules_to_save=tuple(_names(reader, "modules_to_save")),
        bias=bias,
        ensure_weight_tying=reader.flag("ensure_weight_tying", default=False),
        fan_in_fan_out=reader.flag("fan_in_fan_out", default=False),
        pool=pool,
        base_model=reader.text("base_model_name_or_path", default=None),
        task_type=reader.text("task_type", default=None),
    )


def _patterns(reader: ConfigReader, key: str) -> dict[str, Any]:
    """Ranks or scales by regular expression."""
    table = reader.table(key)
    if table is None:
        return {}
    if len(table.data) > 10_000:
        raise reader.bad(key, len(table.data), "at most 10000 patterns")
    for text in table.data:
        pattern(text, table.where)
    if key == "rank_pattern":
        return {text: table.integer(text, high=1 << 16) for text in table.data}
    return {text: table.number(text) for text in table.data}


def _names(reader: ConfigReader, key: str, text: bool = False) -> Any:
    """A list of names; with `text`, or one string."""
    value = reader.data.get(key) or []
    if text and isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(n, str) for n in value):
        raise reader.bad(key, value, "a list of names")
    return tuple(value)


def config_of(adapter: Adapter) -> dict[str, Any]:
    """Content of adapter_config.json."""
    targets = adapter.target_modules
    if targets is None:
        targets = sorted({name.rpartition(".")[2] for name in adapter.layers})
    pooled = {"use_qalora": True, "qalora_group_size": adapter.pool}
    return {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "r": adapter.r,
        "lora_alpha": _whole(adapter.alpha),
        "lora_dropout": 0.0,
        "rank_pattern": dict(adapter.rank_pattern),
        "alpha_pattern": {k: _whole(v) for k, v in adapter.alpha_pattern.items()},
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "modules_to_save": list(adapter.modules_to_save) or None,
        "bias": adapter.bias,
        "ensure_weight_tying": adapter.ensure_weight_tying,
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "init_lora_weights": True,
        **(pooled if adapter.pool > 1 else {}),
    }


def _whole(number: float) -> float:
    """The integer that a float is, which PEFT expects for alpha."""
    return int(number) if float(number).is_integer() else number

"""Quantization-aware training: one configuration drives training and export.

`prepare` puts a model into a state in which every product is, bit for bit, that of the
quantized model it would become, with gradients for its float weights and for whatever
is learned beside them (`qjax.nn.qat`). `convert` stores the codes of that state, so a
converted model gives the logits that training saw.

    prepare(model, QAT("int4-g64", learn="lsq"))
    step = Step(model, tx, wrt=config.wrt)
    ...
    model = convert(model)

Weights are held in float32 while they are trained. With `lora` only adapters are (and
scales): the sum of weight and adapter is rounded, and converting stores the codes of
the sum. Eight-bit mixed-precision training is `QAT("int8", activations="int8",
backward=("dgrad", "wgrad"))`: forward products round weights and activations, those of
the gradient their operands.

Reference: PyTorch's `torchao.quantization.qat` (one configuration for both phases);
Esser et al., arXiv 1902.08153; Liu et al., LLM-QAT, arXiv 2305.17888.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from qjax.calibration.static import static_inputs
from qjax.converters.gguf_recipe import mixture
from qjax.errors import SpecError
from qjax.formats.base import check_choice
from qjax.methods import Method, RoundInputs, needs_of
from qjax.models import Decoder
from qjax.nn.base import QuantizedLayer
from qjax.nn.qat import Fixed, Learned, Master, Training
from qjax.nn.swap import swap
from qjax.recipes import Recipe, Rule, load_recipe
from qjax.train.mesh import on_one_device
from qjax.train.qat_layers import (
    PreparedWeight,
    QATReport,
    entry,
    layers,
    split_runs,
    take_adapters,
)
from qjax.tree import check_matched
from qjax.wrappers import ACTIVATIONS, RoundedInputs


@dataclasses.dataclass(frozen=True)
class QAT:
    """Settings of quantization-aware training.

    Attributes:
      recipe: formats and methods of weights: a recipe, a format, a preset name or a
        JSON file. Methods that need calibration cannot be run in every step.
      learn: `"none"`, the method chooses scales anew in every step; or `"lsq"`, scales
        and zero-points of `Int` formats are learned.
      activations: round the inputs of weights to `"int8"` or `"float8_e4m3fn"`.
      static: one scale for all inputs of a weight, from calibration, instead of one per
        row; with `learn="lsq"` it is learned.
      calibration: the text file that a run's static scales come from; by default the
        first windows of what it trains on.
      start_step: first training step at which anything is rounded. The training step
        says which it is with `qjax.nn.qat.at_step`; outside of training everything is.
      lora: a `qjax.train.lora.LoRA`: train adapters in place of the weights.
      backward: which products of the gradient run on int8 operands, of `"dgrad"` (of
        inputs) and `"wgrad"` (of weights).
      others: also train what is not rounded: norms, biases, embeddings.

    Raises:
      SpecError: a field is out of range.
    """

    recipe: Any = "int4-g64"
    learn: str = "none"
    activations: str | None = None
    static: bool = False
    calibration: str | None = None
    start_step: int = 0
    lora: Any = None
    backward: tuple[str, ...] = ()
    others: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "backward", tuple(self.backward))
        check_choice("QAT", "learn", self.learn, ("none", "lsq"))
        check_choice("QAT", "activations", self.activations, (None, *ACTIVATIONS))
        for name in self.backward:
            check_choice("QAT", "backward", name, ("dgrad", "wgrad"))
        if type(self.start_step) is not int or self.start_step < 0:
            raise SpecError(
                f"QAT: start_step is {self.start_step!r}, expected the number of a "
                "step, 0 or more"
            )
        if self.static and self.activations is None:
            raise SpecError(
                "QAT: static=True is about rounded activations; set activations too"
            )
        if self.calibration is not None and not self.static:
            raise SpecError(
                f"QAT: calibration={self.calibration!r:.80} is for static scales of "
                "activations; set static=True, or leave it out"
            )
        if self.others and self.lora is not None:
            raise SpecError(
                "QAT: others=True trains what adapters leave as it is; leave one out"
            )

    @property
    def wrt(self) -> Any:
        """Filter of the variables to train, for `qjax.train.step.Step`."""
        if self.lora is not None:
            return nnx.Any(nnx.LoRAParam, Learned)
        return nnx.Param if self.others else nnx.Any(Master, Learned)


def prepare(
    model: Any,
    config: QAT,
    *,
    key: Array | None = None,
    calibration: Any = None,
    observer: Any = None,
    original: Any = None,
) -> QATReport:
    """Puts a model into the state of quantization-aware training, in place.

    Args:
      model: a dense `Decoder`, or a module that `qjax.nn.quantize_module` made of
        another; with `config.lora` a `Decoder`'s weights may be packed.
      config: the settings.
      key: of the adapters' initial values; needed with `config.lora`.
      calibration: token ids `[windows, time]` or `[tokens]`, for static scales.
      observer: of `qjax.calibration`, chooses static scales to start from.
      original: see `qjax.train.attach`.

    Returns:
      What became of every weight.

    Raises:
      SpecError: the recipe does not apply, needs calibration or rotates; a weight is
        packed; an argument is missing that a setting needs.
      UnsupportedError: adapters with dropout.
    """
    recipe = _recipe(model, config)
    if config.static and (calibration is None or not isinstance(model, Decoder)):
        raise SpecError("prepare: static=True needs a Decoder and calibration=tokens")
    if config.lora is not None:
        if key is None:
            raise SpecError("prepare: adapters start from random values; pass key=")
        from qjax.train.lora import attach

        attach(model, config.lora, key, original=original)
    if isinstance(model, Decoder):
        split_runs(model, recipe)
    adapters = take_adapters(model, recipe)
    done, kept, seen = [], [], []
    masters: dict[int, Master] = {}
    for path, names, layer in layers(model):
        seen += names
        rule = recipe.match(names[0], (1, 1))
        if rule is None:
            kept.append(path)
            continue
        adapter = adapters.get(id(layer))
        done.append(_prepare(layer, path, rule, config, adapter, masters))
    check_matched(recipe, [one.path for one in done], seen)
    if config.static:
        _calibrate(model, config, calibration, observer)
    return QATReport(tuple(done), tuple(kept))


def convert(model: Any) -> Any:
    """Returns a copy of a model in training whose weights are stored as codes.

    The codes are those that the model multiplies by; see `qjax.nn.freeze` for layers
    that are not in training. The copy of a model on a mesh is on one device.

    Args:
      model: after `prepare`.

    Raises:
      SpecError: nothing in the model is in training.
      NonFiniteError: training has spoiled a weight; the message names it.
    """
    made = nnx.clone(model)
    found = [(path, layer) for path, _, layer in layers(made) if layer.qat is not None]
    if not found:
        raise SpecError(
            "convert: no layer is in quantization-aware training; prepare the model "
            "first"
        )
    for path, layer in found:
        layer.freeze(path)
    nnx.update(made, on_one_device(nnx.state(made)))
    return made


def _recipe(model: Any, config: QAT) -> Recipe:
    """The recipe, for this model, whose every rule can run in a training step."""
    recipe = load_recipe(config.recipe)
    if recipe.rotate is not None:
        raise SpecError(
            f"prepare: recipe {recipe.name!r} rotates the model before it is "
            "quantized; train with a recipe that does not"
        )
    if isinstance(model, Decoder):
        recipe = mixture(recipe, model.config, imatrix=False)
    elif recipe.mixture is not None:
        raise SpecError(f"prepare: recipe {recipe.name!r} is for decoders alone")
    for rule in recipe.rules:
        needs = needs_of(rule.method) if rule.format is not None else ()
        if needs:
            raise SpecError(
                f"prepare: {rule.method.name} of recipe {recipe.name!r} needs "
                f"calibration ({', '.join(sorted(needs))}), which a training step does "
                "not have; use a recipe such as 'int4-g64', or other rules"
            )
    return recipe


def _prepare(
    layer: QuantizedLayer,
    path: str,
    rule: Rule,
    config: QAT,
    adapter: Any,
    masters: dict[int, Master],
) -> PreparedWeight:
    """Puts one layer into training."""
    method, activation = _rounding(layer, path, rule, config)
    if layer.frozen and config.lora is None:
        raise SpecError(
            f"{path}: is packed already; train the original model, or adapters (lora=)"
        )
    if layer.frozen and adapter is None:
        return entry(layer, path, "frozen", None)
    if layer.frozen:
        layer.format, layer.method = rule.format, method
    else:
        swap(layer, rule, method, path)
    if config.lora is None:
        held = layer.variable
        value = held.get_value()
        layer.qat = _training(layer, path, config, activation, None)
        wide = jnp.asarray(value, jnp.float32)
        master = masters.setdefault(id(held), Master(wide))
        setattr(layer, layer.weight_name, master)
    else:
        layer.qat = _training(layer, path, config, activation, adapter)
    return entry(layer, path, method.name, activation)


def _training(layer, path, config: QAT, activation, adapter) -> Training:
    try:
        return Training(
            layer,
            learn=config.learn,
            activation=activation,
            start=config.start_step,
            backward=config.backward,
            adapter=adapter,
        )
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None


def _rounding(layer, path, rule: Rule, config: QAT) -> tuple[Method, str | None]:
    """The method for the weight alone, and what the layer's inputs are rounded to."""
    method, activation = rule.method, config.activations
    if isinstance(method, RoundInputs):
        if activation not in (None, method.activation):
            raise SpecError(
                f"{path}: the recipe rounds activations to {method.activation}, "
                f"activations={activation!r}; leave the latter out"
            )
        method, activation = method.inner, method.activation
    return method, activation if layer.weight_axis == -2 else None


def _calibrate(model: Decoder, config: QAT, tokens: Any, observer: Any) -> None:
    """Gives the layers of blocks static scales of their inputs."""
    params = static_inputs(convert(model), tokens, observer).params()
    for _, names, layer in layers(model):
        if layer.qat is None:
            continue
        scales = [_scale_of(params[name]) for name in names]
        if any(scale is None for scale in scales):
            continue  # the head's: its inputs are not observed
        kind = Learned if config.learn == "lsq" else Fixed
        layer.qat.inputs = kind(jnp.stack(scales))


def _scale_of(w: Any) -> Any:
    return w.scale if isinstance(w, RoundedInputs) else None

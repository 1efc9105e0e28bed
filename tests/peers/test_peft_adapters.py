"""Adapters that were trained here, one for every weight, in PEFT: the same logits."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import jax  # noqa: E402
from flax import nnx  # noqa: E402

from qjax.converters.adapter_tree import adapter_of_tree, tree_of  # noqa: E402
from qjax.converters.adapters import merged  # noqa: E402
from qjax.converters.peft import read_adapter, write_adapter  # noqa: E402
from qjax.converters.peft_forms import in_form  # noqa: E402
from qjax.converters.peft_settings import Factors  # noqa: E402
from qjax.models import Decoder, ModelConfig, from_hf, plan  # noqa: E402
from qjax.train.adapters import save_adapter  # noqa: E402
from qjax.train.lora import LoRA, attach  # noqa: E402

_SCRIPT = Path(__file__).resolve().parent.parent / "golden/models/make_golden.py"
_SPEC = importlib.util.spec_from_file_location("make_golden_adapters", _SCRIPT)
assert _SPEC is not None and _SPEC.loader is not None
golden = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(golden)

pytestmark = [  # of PEFT about its own settings, and of PyTorch about its parts
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]
ALL = (
    *(f"attn.{n}" for n in ("q", "k", "v", "o")),
    *(f"mlp.{n}" for n in ("gate", "up", "down")),
)
# family, what to adapt in which layers, kind, form
CASES = [
    ("llama", ALL, "lora", "plain"),
    ("llama", ("attn.q", "mlp.down", "embed"), "rslora", "plain"),
    ("llama", ALL, "lora", "uniform"),
    ("llama", ("attn.q", "mlp.down"), "qalora", "plain"),
    ("llama", ("attn.v", "mlp.up"), "dora", "plain"),
    ("qwen2", ALL, "dora", "plain"),
    ("gemma2", ALL, "rslora", "uniform"),
    ("gpt2", ("attn.q", "attn.v", "mlp.up", "mlp.down", "embed"), "lora", "plain"),
    ("gpt2", ("attn.q", "attn.k", "attn.v", "attn.o"), "dora", "plain"),
    ("phi3", ("attn.q", "attn.k", "mlp.up", "mlp.down"), "lora", "plain"),
    ("phi3", ("attn.q", "attn.k", "attn.v"), "dora", "uniform"),
    ("gpt_neox", ("attn.q", "attn.v", "mlp.up"), "rslora", "plain"),
]


@nnx.jit
def run(model, tokens):
    return model(tokens)[0]


def models(family: str):
    """Configuration, parameters and the same model in PyTorch."""
    case = next(c for c in golden.CASES if golden.family(c) == family)
    config = ModelConfig.from_hf(golden.CASES[case])
    tensors = {
        entry.name: golden.make_weight(entry.name, entry.shape)
        for entry in plan(config)
        if not entry.optional
    }
    return config, from_hf(config, tensors), golden.load_reference(golden.CASES[case])


def floats(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype("float32")


def trained(params: dict, config: ModelConfig, names: tuple[str, ...], kind: str):
    """A tree with other ranks and scales in other places, and what it makes of params.

    The weights are computed here, in float64.
    """
    tree, made = {}, dict(params)
    for seed, name in enumerate(names):
        for layer in range(config.layers if name != "embed" else 1):
            if layer == 1 and seed == 1 and kind != "dora":
                continue  # a layer without
            key = name if name == "embed" else f"layers.{layer}.{name}"
            path = f"{key}.{'embedding' if name == 'embed' else 'kernel'}"
            w = np.asarray(params[path], np.float64)
            rank, alpha = 2 + seed % 3, (8.0, 5.0, 6.0)[layer]
            pool = 8 if kind == "qalora" else 1
            a = 0.3 / pool * floats(w.shape[0] // pool, rank, seed=3 * seed + layer)
            b = 0.3 * floats(rank, w.shape[1], seed=3 * seed + layer + 100)
            scale = alpha / (rank**0.5 if kind == "rslora" else rank)
            scale *= len(a) if pool > 1 else 1
            own = {"a": a, "b": b, "rank": rank, "alpha": alpha, "scale": scale}
            mean = np.repeat(a.astype(np.float64), pool, 0) / pool
            w = w + scale * (mean @ b)
            if kind == "dora":
                norm = np.linalg.norm(w, axis=0)
                magnitude = norm * (1.2 + 0.1 * np.cos(np.arange(len(norm))))
                own["magnitude"] = magnitude.astype(np.float32)
                w = w * (own["magnitude"] / norm)
            tree[key], made[path] = own, w.astype(np.float32)
    if config.tied and "embed" in names:  # the head stays what it was
        made["head.kernel"] = params["embed.embedding"].T
    return tree, made


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[2]}-{c[3]}")
def test_peft_computes_what_was_trained(case, tmp_path):
    family, names, kind, form = case
    config, params, theirs = models(family)
    names = tuple(n for n in names if n != "mlp.gate" or config.gated)
    tree, made = trained(params, config, names, kind)
    want = np.asarray(run(Decoder(config, made), golden.make_tokens()))
    before = golden.reference_logits(theirs, golden.make_tokens())
    assert np.abs(want - before).max() > 1e-2 * np.abs(want).max()
    adapter = adapter_of_tree(config, tree)
    write_adapter(tmp_path / "a", in_form(adapter, form))
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    got = golden.reference_logits(loaded, golden.make_tokens())
    assert np.abs(got - want).max() <= 3e-4 * np.abs(want).max()
    adapted = {n for n, m in loaded.named_modules() if hasattr(m, "lora_A")}
    assert len(adapted) == len(adapter.layers)
    # and once more through the file: what PEFT loaded is what is read
    again = tree_of(config, read_adapter(tmp_path / "a"))
    if form == "plain" and kind != "qalora" and family in ("llama", "qwen2"):
        for name, own in tree.items():
            for key, value in own.items():
                np.testing.assert_allclose(again[name][key], value, rtol=1e-12)
                if isinstance(value, np.ndarray):
                    np.testing.assert_array_equal(again[name][key], value)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", LoRA(rank=3, variant="rslora", targets=("attn.q", "mlp.down"))),
        ("phi3", LoRA(rank=2, variant="dora", targets=("q", "k", "v"))),
        ("gpt2", LoRA(rank=2, targets=("c_attn", "embed"))),
    ],
    ids=["llama", "phi3", "gpt2"],
)
def test_peft_computes_what_the_model_under_training_does(family, config, tmp_path):
    ours, params, theirs = models(family)
    model = Decoder(ours, params)
    attach(model, config, jax.random.key(0))

    def moved(x):
        return x + 0.2 * jax.random.normal(jax.random.key(1), x.shape)

    nnx.update(model, jax.tree.map(moved, nnx.state(model, nnx.LoRAParam)))
    want = np.asarray(run(model, golden.make_tokens()))
    before = golden.reference_logits(theirs, golden.make_tokens())
    assert np.abs(want - before).max() > 1e-2 * np.abs(want).max()
    save_adapter(model, tmp_path / "a")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    got = golden.reference_logits(loaded, golden.make_tokens())
    assert np.abs(got - want).max() <= 3e-4 * np.abs(want).max()


def test_pooled_inputs_are_those_of_peft():
    """PEFT pools inputs over GPTQ layers only; its arithmetic takes any module."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    a, b, x = floats(4, 3, seed=1), floats(3, 8, seed=2), floats(5, 32, seed=3)
    alpha, rank = 6.0, 3
    layers = [torch.nn.Linear(4, 3, bias=False), torch.nn.Linear(3, 8, bias=False)]
    for layer, w in zip(layers, (a, b), strict=True):
        layer.weight.data = torch.from_numpy(w.T.copy())
    module = SimpleNamespace(
        lora_A={"x": layers[0]},
        lora_B={"x": layers[1]},
        lora_dropout={"x": torch.nn.Identity()},
        scaling={"x": alpha / rank},
        qalora_group_size={"x": 8},
        in_features=32,
        training=False,
    )
    with torch.no_grad():
        zero = torch.zeros(5, 8)
        got = QALoraLinearVariant.forward(module, "x", torch.from_numpy(x), zero)
    own = Factors(a, b, 4 * alpha / rank, pool=8)  # as `read_adapter` makes it
    delta = np.asarray(merged(np.zeros((32, 8), np.float32), own))
    np.testing.assert_allclose(x @ delta, got.numpy(), rtol=1e-4, atol=1e-4)

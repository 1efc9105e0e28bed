"""Adapters side by side with PEFT: the same logits, whoever wrote the file."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import jax  # noqa: E402
from flax import nnx  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

import qjax  # noqa: E402
from qjax.converters.adapters import attach  # noqa: E402
from qjax.converters.peft import read_adapter, write_adapter  # noqa: E402
from qjax.formats import Int  # noqa: E402
from qjax.models import Decoder, ModelConfig, from_hf, plan, to_hf  # noqa: E402
from qjax.wrappers import LowRank, Transposed  # noqa: E402

_SCRIPT = Path(__file__).resolve().parent.parent / "golden/models/make_golden.py"
_SPEC = importlib.util.spec_from_file_location("make_golden_peft", _SCRIPT)
assert _SPEC is not None and _SPEC.loader is not None
golden = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(golden)

LLAMA = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
PATTERNS = {
    # PEFT writes patterns sorted and takes the first: they must not overlap
    "rank_pattern": {r"layers\.0\.self_attn\..*_proj": 2, "down_proj": 5},
    "alpha_pattern": {"layers.1.self_attn.v_proj": 3, "^.*o_proj": 32},
}
TIED = next(
    name
    for name, data in golden.CASES.items()
    if golden.family(name) == "llama" and ModelConfig.from_hf(data).tied
)
# name, golden case, settings of LoraConfig
CASES = [
    ("lora", "llama", {"target_modules": LLAMA}),
    ("rslora", "llama", {"target_modules": LLAMA, "use_rslora": True}),
    ("dora", "llama", {"target_modules": LLAMA, "use_dora": True}),
    ("patterns", "llama", {"target_modules": LLAMA, **PATTERNS}),
    ("regex", "llama", {"target_modules": r".*layers\.1\..*_proj"}),
    ("head", "llama", {"target_modules": ["lm_head", "q_proj"]}),
    ("embeddings", "llama", {"target_modules": ["embed_tokens", "k_proj"]}),
    (
        "embeddings-dora",
        "llama",
        {"target_modules": ["embed_tokens"], "use_dora": True},
    ),
    ("saved", "llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    (
        "saved-norm",
        "llama",
        {"target_modules": ["k_proj"], "modules_to_save": ["norm"]},
    ),
    ("tied-embeddings", TIED, {"target_modules": ["embed_tokens"]}),
    ("tied-head", TIED, {"target_modules": ["lm_head"]}),
    (
        "tied-saved",
        TIED,
        {"target_modules": LLAMA, "modules_to_save": ["embed_tokens"]},
    ),
    (
        "tied-both",
        TIED,
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    ("biases", "qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    ("own-biases", "qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    ("fused", "phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    ("fused-dora", "phi3", {"target_modules": ["qkv_proj"], "use_dora": True}),
    ("interleaved", "gpt_neox", {"target_modules": ["query_key_value", "embed_in"]}),
    (
        "interleaved-dora",
        "gpt_neox",
        {"target_modules": ["query_key_value", "dense"], "use_dora": True},
    ),
    (
        "conv1d",
        "gpt2",
        {"target_modules": ["c_attn", "c_fc", "wpe"], "fan_in_fan_out": True},
    ),
    (
        "conv1d-dora",
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True},
    ),
    ("scaled-embeddings", "gemma3_text", {"target_modules": ["embed_tokens"]}),
]
pytestmark = [  # of PEFT about its own settings, and of PyTorch about its parts
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


@nnx.jit
def run(model, tokens):
    return model(tokens)[0]


def case_of(family: str) -> str:
    cases = golden.CASES
    return (
        family
        if family in cases
        else next(name for name in cases if golden.family(name) == family)
    )


def ours_and_theirs(case: str):
    """The golden model of a case, in JAX and in PyTorch."""
    config = ModelConfig.from_hf(golden.CASES[case])
    tensors = {
        entry.name: golden.make_weight(entry.name, entry.shape)
        for entry in plan(config)
        if not entry.optional
    }
    return (
        Decoder(config, from_hf(config, tensors)),
        golden.load_reference(golden.CASES[case]),
    )


def adapted(model, options: dict):
    """A PEFT model with adapters that are not zero."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options)
    made = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "magnitude" in name:
                p.mul_(torch.rand_like(p) + 0.5)
            elif p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return made


def logits(model) -> np.ndarray:
    return golden.reference_logits(model, golden.make_tokens())


def equal(model, want: np.ndarray) -> None:
    got = np.asarray(run(model, golden.make_tokens()))
    assert np.abs(got - want).max() <= 2e-4 * np.abs(want).max()


@pytest.mark.parametrize("name, family, options", CASES, ids=[c[0] for c in CASES])
def test_the_same_logits(name, family, options, tmp_path):
    ours, theirs = ours_and_theirs(case_of(family))
    before = logits(theirs)
    theirs = adapted(theirs, options)
    want = logits(theirs)
    assert np.abs(want - before).max() > 1e-2 * np.abs(want).max()
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs")
    equal(attach(ours, adapter), want)

    write_adapter(tmp_path / "ours", adapter)
    first = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    again = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert first.keys() == again.keys()
    for key, tensor in first.items():
        np.testing.assert_array_equal(again[key], tensor)
    if name == "dora":
        (tmp_path / "theirs" / "adapter_model.safetensors").unlink()
        state = {key: torch.from_numpy(tensor) for key, tensor in first.items()}
        torch.save(state, tmp_path / "theirs" / "adapter_model.bin")
        equal(attach(ours, read_adapter(tmp_path / "theirs")), want)
    _, plain = ours_and_theirs(case_of(family))
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    np.testing.assert_array_equal(logits(loaded), want)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_over_packed_weights(family, options, tmp_path):
    """The adapter over codes equals PEFT's over the weights that they stand for."""
    model, theirs = ours_and_theirs(case_of(family))
    params, plain = {}, {}
    for path, leaf in model.params().items():
        table = path.startswith("embed.")
        if table or path.endswith("kernel"):
            leaf = qjax.quantize(leaf, Int(4, 16), axis=-1 if table else -2)
        params[path] = leaf
        plain[path] = np.asarray(
            qjax.dequantize(leaf, "float32")
            if table or path.endswith("kernel")
            else leaf
        )
    state = {n: torch.from_numpy(np.array(t)) for n, t in to_hf(model.config, plain)}
    theirs.load_state_dict(state)
    targets = LLAMA if family == "llama" else ["qkv_proj", "down_proj"]
    targets = [*targets, "embed_tokens"]
    theirs = adapted(theirs, {"target_modules": targets, **options})
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    packed = Decoder(model.config, params)
    with jax.default_matmul_precision("float32"):
        made = attach(packed, read_adapter(tmp_path))
        for path in ("layers.0.attn.q.kernel", "embed.embedding"):
            kernel = made.params()[path]
            assert isinstance(kernel, Transposed if options else LowRank)
        equal(made, logits(theirs))

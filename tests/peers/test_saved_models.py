"""A small random Llama that other libraries quantized and saved, and that we wrote.

Logits of theirs and ours agree to the rounding of the dtype they compute in.
"""

import json

import jax
import numpy as np
import pytest

import qjax
from qjax.checkpoint import checkpoint_parts
from qjax.converters.huggingface import open_checkpoint
from qjax.models import Decoder, ModelConfig
from qjax.wrappers import RoundedInputs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = np.arange(12)[None]


@pytest.fixture(scope="module", autouse=True)
def eager():
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The dense model's directory."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("dense")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    made.save(str(folder / "tokenizer.json"))
    return folder


def load(folder, **options):
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32, **options).eval()


def theirs(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.float().numpy()


def parameters(folder) -> dict:
    params = {}
    with open_checkpoint(folder) as source:
        for _, part in checkpoint_parts(source):
            params |= {path: leaf for path, leaf in part.items()}
    return params


def ours(folder) -> np.ndarray:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    made = Decoder(ModelConfig.from_hf(config), parameters(folder), dtype="float32")
    with jax.default_matmul_precision("float32"):  # activations are not rounded
        return np.asarray(made(TOKENS)[0])


def tensors(folder) -> dict[str, np.ndarray]:
    with open_checkpoint(folder) as source:
        return {name: np.array(source.read(name)) for name in source.names()}


def same_tensors(made, want) -> None:
    made, want = tensors(made), tensors(want)
    assert made.keys() == want.keys()
    for name, leaf in want.items():
        assert made[name].dtype == leaf.dtype
        np.testing.assert_array_equal(made[name], leaf, err_msg=name)


def bits(kind: str):
    pytest.importorskip("bitsandbytes")
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind[:3],
        bnb_4bit_use_double_quant=kind.endswith("-nested"),
        bnb_4bit_compute_dtype=torch.float32,
    )


def expanded(model, plain):
    """The dense model of the weights that bitsandbytes decodes, by itself."""
    functional = pytest.importorskip("bitsandbytes").functional
    dense = load(plain)
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind == "Linear4bit":
            packed, state = module.weight.data, module.weight.quant_state
            weight = functional.dequantize_4bit(packed, state)
        elif kind == "Linear8bitLt":
            codes, absmax = module.weight.data, module.weight.SCB
            weight = functional.int8_vectorwise_dequant(codes, absmax)
        else:
            continue
        dense.get_submodule(name).weight.data = weight.float().reshape(
            dense.get_submodule(name).weight.shape
        )
    return dense


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "fp4-nested", "int8"])
def test_bitsandbytes(kind, plain, tmp_path):
    model = load(plain, quantization_config=bits(kind))
    model.save_pretrained(tmp_path / "theirs")
    want = theirs(expanded(model, plain))  # before the first call re-packs weights
    got = ours(tmp_path / "theirs")
    np.testing.assert_allclose(got, want, atol=2e-6)
    rounded = theirs(model)  # activations to bfloat16 or 8 bits
    np.testing.assert_allclose(got, rounded, atol=0.02 * np.abs(got).max())

    done = qjax.convert(tmp_path / "theirs", tmp_path / "ours", "bnb")
    assert len(done.exact) == 14 and done.kept == ["lm_head"] and not done.rounded
    same_tensors(tmp_path / "ours", tmp_path / "theirs")
    again = theirs(expanded(load(tmp_path / "ours"), plain))
    np.testing.assert_array_equal(again, want)


@pytest.mark.parametrize("recipe", ["nf4", "int8"])
def test_our_weights_in_bitsandbytes(recipe, plain, tmp_path):
    qjax.quantize_checkpoint(plain, tmp_path / "packed", recipe)
    qjax.convert(tmp_path / "packed", tmp_path / "ours", "bnb")
    model = load(tmp_path / "ours")
    kind = type(model.model.layers[0].mlp.up_proj).__name__
    assert kind == {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[recipe]
    want = ours(tmp_path / "ours")
    np.testing.assert_allclose(theirs(expanded(model, plain)), want, atol=2e-6)


def auto_round(plain, folder, layout: str, symmetric: bool):
    """The directory auto-round exports, and the weights it rounded to."""
    module = pytest.importorskip("auto_round")
    file = str(plain / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file)
    rounding = module.AutoRound(
        load(plain),
        tokenizer,
        bits=4,
        group_size=32,
        sym=symmetric,
        iters=0,
        disable_opt_rtn=True,
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounding.quantize_and_save(str(folder), format=layout)
    (made,) = (file.parent for file in folder.rglob("config.json"))
    return made


@pytest.mark.parametrize("layout", ["auto_round", "auto_gptq"])
def test_auto_round(layout, plain, tmp_path):
    folder = auto_round(plain, tmp_path, layout, True)
    config = transformers.AutoRoundConfig(backend="torch")
    model = load(folder, device_map="cpu", quantization_config=config)
    kind = type(model.model.layers[0].mlp.up_proj).__module__
    assert kind.startswith("auto_round_extension.torch")
    want = theirs(model)  # in half precision
    np.testing.assert_allclose(ours(folder), want, atol=2e-3 * np.abs(want).max())
    if layout == "auto_gptq":
        done = qjax.convert(folder, tmp_path / "ours", "gptq")
        assert len(done.exact) == 14
        same_tensors(tmp_path / "ours", folder)


def test_layouts_of_auto_round_hold_the_same_weights(plain, tmp_path):
    kinds = ("auto_round", "auto_gptq", "auto_awq")
    folders = [auto_round(plain, tmp_path / k, k, False) for k in kinds]
    first, *others = (parameters(folder) for folder in folders)
    dense = parameters(plain)
    for path, q in first.items():
        if not path.endswith("kernel") or path == "head.kernel":
            continue
        want = np.asarray(q.dequantize("float32"))
        for other in others:
            np.testing.assert_array_equal(other[path].dequantize("float32"), want)
        assert np.abs(want - dense[path]).mean() < 0.3 * np.asarray(q.scale).mean()
    for folder, kind in zip(folders[1:], ("gptq", "awq"), strict=True):
        qjax.convert(folder, tmp_path / f"ours-{kind}", kind)
        same_tensors(tmp_path / f"ours-{kind}", folder)


@pytest.mark.parametrize("kind", ["int8", "float8", "w8a8"])
def test_torchao(kind, plain, tmp_path):
    module = pytest.importorskip("torchao.quantization")
    config = {
        "int8": lambda: module.Int8WeightOnlyConfig(version=2),
        "float8": module.Float8WeightOnlyConfig,
        "w8a8": lambda: module.Int8DynamicActivationInt8WeightConfig(version=2),
    }[kind]()
    model = load(plain, quantization_config=transformers.TorchAoConfig(config))
    model.save_pretrained(tmp_path)
    # torchao divides the greatest activation by 127.5 steps, not by 127.
    close = 2e-2 if kind == "w8a8" else 3e-6
    np.testing.assert_allclose(ours(tmp_path), theirs(model), atol=close)
    kernel = parameters(tmp_path)["layers.0.mlp.up.kernel"]
    assert isinstance(kernel, RoundedInputs) == (kind == "w8a8")


@pytest.mark.parametrize("kind", ["qint8", "qint4", "qfloat8"])
def test_quanto(kind, plain, tmp_path):
    module = pytest.importorskip("optimum.quanto")
    causal = module.QuantizedModelForCausalLM
    weights = getattr(module, kind)
    model = causal.quantize(load(plain), weights=weights, exclude="lm_head")
    model.save_pretrained(tmp_path / "theirs")
    want = theirs(model._wrapped)
    np.testing.assert_allclose(ours(tmp_path / "theirs"), want, atol=3e-6)
    done = qjax.convert(tmp_path / "theirs", tmp_path / "ours", "quanto")
    assert len(done.exact) == 14 and not done.rounded
    again = causal.from_pretrained(tmp_path / "ours")
    np.testing.assert_allclose(theirs(again._wrapped.float()), want, atol=3e-6)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("bits", [4, 2])
def test_hqq(bits, pickled, plain, tmp_path):
    core = pytest.importorskip("hqq.core.quantize")
    hf = pytest.importorskip("hqq.models.hf.base").AutoHQQHFModel
    model = load(plain)
    config = core.BaseQuantizeConfig(nbits=bits, group_size=32, axis=1)
    hf.quantize_model(model, config, compute_dtype=torch.float32, device="cpu")
    if pickled:  # qmodel.pt, nested
        hf.save_quantized(model, str(tmp_path / "theirs"))
    else:
        hf.save_to_safetensors(model, str(tmp_path / "theirs"))
        hf.cache_model(model, str(tmp_path / "theirs"))  # config.json
    want = theirs(model)
    np.testing.assert_allclose(ours(tmp_path / "theirs"), want, atol=3e-6)
    done = qjax.convert(tmp_path / "theirs", tmp_path / "ours", "hqq")
    assert len(done.exact) == 14 and not done.rounded
    np.testing.assert_allclose(ours(tmp_path / "ours"), want, atol=3e-6)

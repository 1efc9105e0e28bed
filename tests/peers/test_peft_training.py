"""Training beside PEFT: the same base, first adapters and batches give the same losses.

The base of QLoRA is written by bitsandbytes (NF4, double quantization) and read here;
both compute in float32. AdamW is PyTorch's there and optax's here.
"""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402
import optax  # noqa: E402

from qjax.checkpoint import checkpoint_parts  # noqa: E402
from qjax.converters.huggingface import open_checkpoint  # noqa: E402
from qjax.models import Decoder, ModelConfig  # noqa: E402
from qjax.train.adapters import load_adapter  # noqa: E402
from qjax.train.step import Step  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

STEPS, ROWS, TIME, RATE = 20, 2, 16, 5e-3
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Directories of the dense model and of the same under bitsandbytes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bases")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0 if p.ndim == 2 else 1.0)
    model.save_pretrained(folder / "dense")
    pytest.importorskip("bitsandbytes")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    packed = load(folder / "dense", quantization_config=settings, dtype=torch.float32)
    packed.save_pretrained(folder / "nf4")
    return folder


def batches():
    rng = np.random.default_rng(0)
    return rng.integers(0, SMALL["vocab_size"], (STEPS, ROWS, TIME + 1))


def their_losses(base, settings, start):
    """PEFT's losses; writes the adapter that they start from."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(base, dtype=torch.float32)
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=LINEAR, **settings)
    model = peft.get_peft_model(model, config)
    model.save_pretrained(start)
    model.train()  # in eval bitsandbytes packs weights so that DoRA misreads them
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    losses = []
    for batch in batches():
        ids = torch.as_tensor(batch)
        logits = model(ids[:, :-1]).logits.float()
        flat = logits.reshape(-1, logits.shape[-1])
        loss = torch.nn.functional.cross_entropy(flat, ids[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def our_losses(base, start):
    config = json.loads((base / "config.json").read_text("utf-8"))
    config, params = ModelConfig.from_hf(config), {}
    with open_checkpoint(base) as source:
        for _, part in checkpoint_parts(source):
            params |= part
    model = Decoder(config, params, dtype="float32")
    load_adapter(model, start)
    step = Step(model, optax.adamw(RATE, weight_decay=0.0))
    state = step.init(jax.random.key(0))
    shape = (1, ROWS, TIME)
    places = np.broadcast_to(np.arange(TIME, dtype=np.int32), shape)
    losses = []
    for batch in batches().astype(np.int32):
        state, metrics = step(
            state,
            step.frozen,
            {
                "tokens": batch[None, :, :-1],
                "targets": batch[None, :, 1:],
                "weights": np.ones(shape, np.float32),
                "positions": places,
                "segments": np.ones(shape, np.int32),
            },
        )
        losses.append(float(metrics.loss))
    return np.array(losses)


@pytest.mark.parametrize(
    ("base", "variant"),
    [("dense", "lora"), ("nf4", "lora"), ("nf4", "rslora"), ("nf4", "dora")],
)
def test_losses_step_for_step(base, variant, bases, tmp_path):
    settings = {"r": 4, "lora_alpha": 8}
    if variant != "lora":
        settings[f"use_{variant}"] = True
    want = their_losses(bases / base, settings, tmp_path / "start")
    got = our_losses(bases / base, tmp_path / "start")
    assert want[-1] != pytest.approx(want[0], rel=1e-2)  # it trains
    np.testing.assert_allclose(got, want, rtol=1e-3)

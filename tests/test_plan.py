"""Plans: bytes against analytic counts, which device fits what, and what is refused."""

import importlib.util
import json

import jax
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.abstract import KNOWN, abstract_decoder, find_config
from qjax.devices import parse_device
from qjax.errors import MissingExtraError, SpecError, UnsupportedError
from qjax.formats import Int
from qjax.models import ModelConfig
from qjax.plan import Work, plan
from qjax.plan_parts import shard_bytes
from qjax.train.lora import LoRA
from qjax.train.mesh import Mesh
from qjax.train.optimizers import Optimizer
from qjax.train.qat import QAT

GIB = 2**30

# GiB, counted by hand from the shapes: codes, scales of 8 bits with one float32 for 256
# of them, embeddings with head, adapters of rank 16 and 64 in float32.
COUNTED = {
    "llama-2-7b": (3.016, 0.096, 0.488, 0.149, 0.596),
    "llama-3-8b": (3.250, 0.103, 1.957, 0.156, 0.625),
    "llama-2-13b": (5.908, 0.188, 0.610, 0.233, 0.933),
    "llama-3-70b": (31.875, 1.012, 3.914, 0.771, 3.086),
}


@pytest.mark.parametrize("name", COUNTED)
def test_bytes_are_those_of_the_shapes(name):
    codes, scales, dense, small, large = COUNTED[name]
    for rank, adapters in ((16, small), (64, large)):
        work = Work(lora=LoRA(rank=rank))
        made = plan(name, "h200", mode="finetune", work=work)
        found = {k: v / GIB for k, v in made.breakdown.items()}
        assert found["packed weights"] == pytest.approx(codes, abs=1e-3)
        assert found["scales"] == pytest.approx(scales, abs=1e-3)
        assert found["dense weights"] == pytest.approx(dense, abs=4e-3)
        assert found["adapters"] == pytest.approx(adapters, abs=1e-3)
        assert found["optimizer"] == pytest.approx(2 * adapters, abs=2e-3)
        assert sum(made.breakdown.values()) == made.peak_bytes_per_device
        assert not made.compiled and "estimate" in made.notes[0]


def test_devices_share_all_but_vectors():
    one, four = (
        plan("llama-3-70b", device, mode="finetune", work=Work(batch=4))
        for device in ("h200", "h200-4")
    )
    for part in ("packed weights", "dense weights", "adapters", "optimizer", "batch"):
        assert four.breakdown[part] == pytest.approx(one.breakdown[part] / 4, rel=2e-3)
    two = Work(batch=4, mesh=Mesh(fsdp=2, tensor=2))
    split = plan("llama-3-70b", "h200-4", mode="finetune", work=two)
    assert split.breakdown["packed weights"] == four.breakdown["packed weights"]


def test_training_for_a_format_has_masters_and_what_is_learned():
    def parts(qat, **work):
        made = plan(
            "llama-3-8b", "h200-4", mode="finetune", work=Work(batch=4, qat=qat, **work)
        )
        assert sum(made.breakdown.values()) == made.peak_bytes_per_device
        return made.breakdown

    masters = parts(QAT(Int(4, 128), learn="lsq"))
    linear = 6.979e9
    assert masters["trained weights"] == pytest.approx(linear, rel=1e-3)  # 4 bytes / 4
    assert masters["learned scales"] == pytest.approx(linear / 128, rel=1e-3)
    moments = masters["trained weights"] + masters["learned scales"]
    assert masters["optimizer"] == pytest.approx(2 * moments, rel=1e-3)
    assert masters["packed weights"] == 0 and "adapters" not in masters
    split = parts(QAT(Int(4, 128)), mesh=Mesh(fsdp=2, tensor=2))
    assert split["trained weights"] == masters["trained weights"]
    lora = LoRA(rank=16, init="loftq", original="not read")
    adapters = parts(QAT(Int(4, 128), lora=lora))
    assert adapters["adapters"] == pytest.approx(0.156 * GIB / 4, rel=1e-2)
    assert "trained weights" not in adapters
    with pytest.raises(SpecError, match="is packed already"):
        plan("llama-3-8b", "l4", recipe="nf4", mode="finetune", work=Work(qat=QAT()))


def test_what_fits_where():
    assert plan("llama-3-8b", "l4").fits
    assert not plan("llama-3-70b", "l4").fits
    assert plan("llama-3-8b", "rtx4090", mode="finetune").fits
    assert not plan("llama-2-13b", "l4", recipe="none", mode="finetune").fits
    small = Work(context=4096, cache="int8")
    cache = [
        plan("llama-3-8b", "h100", work=work).breakdown["cache"]
        for work in (Work(context=4096), small)
    ]
    # Two of 8 heads of 128, 32 layers, 4096 tokens; then a byte and a scale each.
    assert cache[0] == pytest.approx(2 * 8 * 128 * 32 * 4096 * 2, rel=1e-3)
    assert 0.5 < cache[1] / cache[0] < 0.6


def test_states_in_the_host_and_of_8_bits():
    def bytes_of(**settings):
        work = Work(lora=LoRA(rank=64), optimizer=Optimizer(**settings))
        made = plan("llama-3-8b", "h100", mode="finetune", work=work)
        return made.breakdown["optimizer"], made.host_bytes

    whole, none = bytes_of()
    assert none == 0
    assert bytes_of(bits=8)[0] == pytest.approx(whole / 4, rel=0.05)
    left, away = bytes_of(offload="always")
    assert left + away == whole and left < 0.01 * whole


def test_shapes_are_those_of_the_model(model_path):
    real = qjax.quantize_model(str(model_path), "nf4")
    config, recipe = find_config(str(model_path))
    assert recipe is None
    made = abstract_decoder(config, "nf4", dtype=np.float32)
    (graph, state), (other, expected) = nnx.split(made), nnx.split(real)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for one, two in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
        assert (one.shape, one.dtype) == (two.shape, two.dtype)
    assert graph.nodes == other.nodes
    assert shard_bytes(state) == sum(x.nbytes for x in jax.tree.leaves(expected))


def test_where_configurations_come_from(tmp_path, model_path):
    expected = ModelConfig.from_hf(KNOWN["llama-3-8b"])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(KNOWN["llama-3-8b"]))
    for source in ("llama-3-8b", "Llama-3-8B", str(path), str(tmp_path)):
        assert find_config(source) == (expected, None)
    qjax.quantize_checkpoint(str(model_path), tmp_path / "packed", "int4-g64")
    config, recipe = find_config(str(tmp_path / "packed"))
    assert recipe is not None and recipe.name == "int4-g64" and config.layers


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        (("llama-3-8b", "v5"), {}, "did you mean v5"),
        (("llama-3-8b", "v5e-3"), {}, "3 of v5e; expected 1, 2, 4, 8"),
        (("llama-3-8b", "h100-0"), {}, "0 of h100"),
        (("llama-3-9b", "h100"), {}, "did you mean llama-3-8b"),
        (("llama-3-8b", "h100"), {"mode": "train"}, "mode is 'train'"),
        (("llama-3-8b", "h100"), {"recipe": "nf5"}, "unknown recipe 'nf5'"),
        (
            ("llama-3-8b", "h100"),
            {"work": Work(context=16384)},
            "context is 16384; the model's is 8192",
        ),
        (
            ("llama-3-8b", "h100-4"),
            {"mode": "finetune"},
            "1 rows of tokens do not divide",
        ),
        (
            ("llama-3-8b", "h100-4"),
            {"mode": "finetune", "work": Work(batch=4, mesh=Mesh(fsdp=2))},
            "is not 4 devices",
        ),
    ],
)
def test_what_is_refused(arguments, options, text):
    with pytest.raises(SpecError, match=text):
        plan(*arguments, **options)


def test_serving_on_several_devices_is_not_supported():
    with pytest.raises(UnsupportedError, match="serving on 4 devices"):
        plan("llama-3-8b", "h100-4")


def test_libtpu_is_an_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'qjax-llm\[tpu\]'"):
        plan("llama-3-8b", "v5e")


def test_names_of_devices():
    assert parse_device("V5E-8") == ("v5e", 8)
    assert parse_device("a100-40g") == ("a100-40g", 1)
    assert parse_device("a100-40g-2") == ("a100-40g", 2)
    with pytest.raises(SpecError, match="batch is 0"):
        Work(batch=0)

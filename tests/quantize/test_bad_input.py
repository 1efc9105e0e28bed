"""Bad models and bad requests: each has its own clear error, and leaves nothing."""

import json

import numpy as np
import pytest

import qjax
from qjax.errors import FormatError, NonFiniteError, SpecError, UnsupportedError
from qjax.io.safetensors import SafetensorsFile, write_safetensors


def rewrite(path, change):
    """Loads all tensors of a directory, changes the dict, writes them back."""
    file = path / "model.safetensors"
    with SafetensorsFile(file) as source:
        tensors = {name: np.array(source.read(name)) for name in source.names()}
    change(tensors)
    file.unlink()
    write_safetensors(file, tensors)


NAME = "model.layers.1.self_attn.q_proj.weight"


def drop(t):
    del t[NAME]


def add(t):
    t["model.layers.9.self_attn.q_proj.weight"] = t[NAME]


def reshape(t):
    t[NAME] = t[NAME][:, :-1].copy()


def integers(t):
    t[NAME] = t[NAME].astype(np.int32)


def not_a_number(t):
    t[NAME][3, 5] = np.nan


def infinite(t):
    t[NAME][3, 5:7] = np.inf


def empty(t):
    t[NAME] = np.zeros((0, 64), np.float32)


@pytest.mark.parametrize(
    ("change", "error", "texts"),
    [
        (drop, FormatError, [NAME, "missing"]),
        (add, FormatError, ["model.layers.9.self_attn.q_proj.weight", "unexpected"]),
        (reshape, FormatError, [NAME, "(64, 63)", "(64, 64)"]),
        (empty, FormatError, [NAME, "(0, 64)", "(64, 64)"]),
        (integers, FormatError, [NAME, "int32", "expected a float"]),
        (
            not_a_number,
            NonFiniteError,
            ["layers.1.attn.q.kernel", "1 of 4096", "(5, 3)"],
        ),
        (infinite, NonFiniteError, ["layers.1.attn.q.kernel", "2 of 4096"]),
    ],
)
def test_bad_tensors_are_named(copied, tmp_path, change, error, texts):
    rewrite(copied, change)
    with pytest.raises(error) as caught:
        qjax.quantize_checkpoint(copied, tmp_path / "out", "int8")
    for text in texts:
        assert text in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_kept_tensors_are_checked_too(copied, tmp_path):
    def spoil(t):
        t["model.norm.weight"][2] = np.nan

    rewrite(copied, spoil)
    with pytest.raises(NonFiniteError, match=r"norm\.scale: 1 of 64 .* index \(2,\)"):
        qjax.quantize_checkpoint(copied, tmp_path / "out", "int8")


def test_nonfinite_weights_can_be_replaced(copied, tmp_path):
    rewrite(copied, not_a_number)
    report = qjax.quantize_checkpoint(
        copied, tmp_path / "out", "int8", nonfinite="zero"
    )
    counts = {t["name"]: t["nonfinite"] for t in report.tensors if "nonfinite" in t}
    assert counts == {"layers.1.attn.q.kernel": 1}
    model, _ = qjax.load(tmp_path / "out")
    w = model.params()["layers.1.attn.q.kernel"].dequantize()
    assert np.isfinite(np.asarray(w)).all() and w[5, 3] == 0


def test_a_group_larger_than_its_axis_names_the_tensor(tiny, tmp_path):
    with pytest.raises(SpecError) as caught:
        qjax.quantize_checkpoint(tiny, tmp_path / "out", "int4-g128")
    text = str(caught.value)
    assert "layers.0.attn" in text and "group of 128" in text and "in=64" in text


def test_unknown_architectures_and_remote_code(copied, tmp_path, edit_config):
    edit_config(copied, auto_map={"AutoConfig": "evil.Config"})
    (copied / "evil.py").write_text("raise SystemExit('executed')")
    qjax.load(copied)
    edit_config(copied, model_type="lama")
    with pytest.raises(UnsupportedError) as caught:
        qjax.load(copied)
    assert "lama" in str(caught.value) and "llama" in str(caught.value)


def test_quantized_sources_are_refused(copied, tmp_path, edit_config, caplog):
    edit_config(copied, quantization_config={"quant_method": "gptq", "bits": 4})
    qjax.load(copied)
    assert "speaks of quantization (gptq), but no tensor is quantized" in caplog.text

    def pack(t):
        t[f"{NAME}.absmax"] = np.ones(64, np.float32)
        t[f"{NAME}.quant_map"] = np.linspace(-1, 1, 16, dtype=np.float32)
        state = {"shape": list(t[NAME].shape), "blocksize": 64, "quant_type": "nf4"}
        name = f"{NAME}.quant_state.bitsandbytes__nf4"
        t[name] = np.frombuffer(json.dumps(state).encode(), np.uint8)
        t[NAME] = np.zeros((t[NAME].size // 2, 1), np.uint8)

    rewrite(copied, pack)
    with pytest.raises(UnsupportedError, match=r"already quantized \(bitsandbytes\)"):
        qjax.quantize_checkpoint(copied, tmp_path / "out", "int8")


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path, make_model):
    make_model(tmp_path / "m", vocab_size=100)
    for act in (
        lambda: qjax.load(tmp_path / "m"),
        lambda: qjax.quantize_checkpoint(tmp_path / "m", tmp_path / "out", "int8"),
    ):
        with pytest.raises(SpecError) as caught:
            act()
        assert "4096" in str(caught.value) and "100" in str(caught.value)


def test_shards_that_are_listed_but_absent_or_outside(copied):
    (copied / "model.safetensors").rename(copied / "model-00001-of-00002.safetensors")
    index = copied / "model.safetensors.index.json"
    for shard, text in (
        ("model-00002-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        ("../../../etc/passwd", "etc/passwd"),
    ):
        index.write_text(json.dumps({"metadata": {}, "weight_map": {NAME: shard}}))
        with pytest.raises((FormatError, SpecError)) as caught:
            qjax.load(copied)
        assert text in str(caught.value)


def test_sources_that_are_no_models(tmp_path):
    with pytest.raises(SpecError, match="no such directory, and not a Hub id"):
        qjax.load(str(tmp_path / "nothing" / "here"))
    with pytest.raises(SpecError, match=r"no config\.json"):
        qjax.load(tmp_path)


def test_an_existing_output_is_not_touched(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    for force, text in ((False, "not empty"), (True, "not a model directory")):
        with pytest.raises(SpecError, match=text):
            qjax.quantize_checkpoint(tiny, tmp_path / "out", "int8", overwrite=force)
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_a_quantized_model_is_not_quantized_again(tiny, tmp_path):
    model = qjax.quantize_model(str(tiny), "int8")
    with pytest.raises(SpecError, match="already quantized"):
        qjax.quantize_model(model, "nf4")
    qjax.save(model, tmp_path / "out")
    for call in (
        lambda: qjax.quantize_checkpoint(tmp_path / "out", tmp_path / "b", "nf4"),
        lambda: qjax.quantize_model(tmp_path / "out", "nf4"),
    ):
        with pytest.raises(SpecError, match="is a qjax artifact"):
            call()


def test_saving_a_model_without_files_says_why(tiny, tmp_path):
    model, _ = qjax.load(tiny)
    own = qjax.Decoder(model.config, model.params())
    with pytest.raises(SpecError, match=r"no config\.json to store"):
        qjax.save(own, tmp_path / "out")

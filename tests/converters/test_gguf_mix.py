"""Presets of llama.cpp: which type every matrix gets."""

import json
from pathlib import Path

import pytest

from qjax.converters.gguf_mix import FILE_TYPES, MIXES, mix_for
from qjax.errors import SpecError
from qjax.models import ModelConfig

GOLDEN = Path(__file__).parent.parent / "golden" / "converters" / "gguf_mix.json"
MODELS = json.loads(GOLDEN.read_text("utf-8"))["models"]
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up")


def config_of(model):
    sizes = model["sizes"]
    return ModelConfig(
        family=model["family"],
        vocab_size=sizes["n_vocab"],
        dim=sizes["n_embd"],
        layers=sizes["n_layer"],
        heads=sizes["n_head"],
        kv_heads=sizes["n_head_kv"],
        head_dim=128,
        mlp_dim=sizes["n_ff"],
        max_context=4096,
        tied=model["family"].startswith("gemma"),
    )


def layers_of(text):
    for run in text.split(","):
        first, _, last = (
            run.rpartition("-") if not run.startswith("-") else ("", "", run)
        )
        yield from range(int(first or last), int(last) + 1)


@pytest.mark.parametrize("name", MODELS)
def test_types_are_those_of_llama_cpp(name):
    model = MODELS[name]
    config, sizes = config_of(model), model["sizes"]
    checked = 0
    for preset, wanted in model["presets"].items():
        if preset not in MIXES:
            continue
        mix = mix_for(preset, config, imatrix=False)
        different = {
            (stem, layer): kind
            for stem, kinds in wanted["different"].items()
            for kind, layers in kinds.items()
            for layer in layers_of(layers)
        }
        ends = ["token_embd.weight", "output.weight"][: 2 - config.tied]
        names = {(end, -1): end for end in ends}
        for layer in range(config.layers):
            for own in (*MATRICES, "ffn_down"):
                names[f"{own}.weight", layer] = f"blk.{layer}.{own}.weight"
        for key, full in names.items():
            width = sizes["n_ff"] if "ffn_down" in full else sizes["n_embd"]
            kind = mix.type_of(full, (64, width))
            assert kind == different.get(key, wanted["base"]), (preset, full)
            checked += 1
    assert checked > 20 * config.layers


def test_rows_that_are_no_whole_blocks_get_smaller_ones():
    config = config_of(MODELS["qwen3-0.6b"])
    mix = mix_for("q4_k_m", config, imatrix=False)
    assert mix.type_of("blk.9.attn_q.weight", (64, 896)) == "q5_0"
    assert mix.type_of("blk.9.attn_q.weight", (64, 80)) == "f16"
    assert mix_for("IQ3_M", config, imatrix=False).type_of(
        "blk.9.attn_q.weight", (64, 96)
    ) == ("iq4_nl")


def test_an_imatrix_changes_some():
    config = config_of(MODELS["qwen3-0.6b"])
    down = "blk.0.ffn_down.weight"
    kinds = [
        mix_for("Q4_0", config, imatrix=known).type_of(down, (64, 1024))
        for known in (False, True)
    ]
    assert kinds == ["q4_0", "q4_1"]


def test_every_preset_has_a_number():
    assert MIXES.keys() == FILE_TYPES.keys()


def test_unknown_presets_are_refused():
    with pytest.raises(SpecError, match=r"preset 'Q9_X': expected one of Q4_0, Q4_1"):
        mix_for("Q9_X", config_of(MODELS["qwen3-0.6b"]), imatrix=False)

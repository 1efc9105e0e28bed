"""The command line: JSON keys, exit statuses, messages."""

import json

import jax
import pytest

from qjax.cli import main

QUANTIZE = {
    "recipe",
    "bits_per_weight",
    "size_bytes",
    "source_bytes",
    "seconds",
    "peak_memory_bytes",
    "tensors",
    "kept",
}
EVALUATE = {
    "protocol",
    "context",
    "tokens",
    "perplexity",
    "bits_per_byte",
    "baseline_perplexity",
    "kl_divergence",
    "top1_agreement",
}
GENERATE = {
    "text",
    "tokens",
    "prompt_tokens",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "peak_memory_bytes",
}
INSPECT = {
    "format",
    "architecture",
    "parameters",
    "bits_per_weight",
    "size_bytes",
    "tensors",
}


def run(capsys, *args):
    """Runs a verb with `--json -` and returns what it printed, parsed."""
    assert main([*map(str, args), "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


@jax.default_matmul_precision("float32")  # a divergence this small has no noise
def test_every_verb_gives_its_json_keys(tiny, tmp_path, capsys, books_text):
    out = tmp_path / "out"
    made = run(capsys, "quantize", tiny, "--to", out, "--recipe", "int8")
    assert set(made) >= QUANTIZE
    assert set(made["tensors"][0]) >= {"name", "format", "method", "error"}
    found = run(capsys, "inspect", out)
    assert set(found) >= INSPECT and found["size_bytes"] == made["size_bytes"]
    assert found["matmul"]["int8-channel"].startswith(("native: ", "cpu: "))
    assert set(found["tensors"][0]) >= {"shape", "bits_per_weight", "nbytes"}
    text = tmp_path / "text.txt"
    text.write_text(books_text[:2000], "utf-8")
    result = run(
        capsys,
        *("evaluate", out, "--text", text, "--context", "32", "--windows", "2"),
        *("--baseline", tiny, "--report", tmp_path / "report"),
    )
    assert set(result) >= EVALUATE and 0 <= result["kl_divergence"] < 0.1
    assert json.loads((tmp_path / "report" / "report.json").read_text())["results"]
    made = run(capsys, "generate", out, "--prompt", "The sea", "--max-tokens", "4")
    assert set(made) >= GENERATE and len(made["tokens"]) <= 4
    dense = run(capsys, "convert", out, "--to", tmp_path / "dense")
    assert dense["formats"] == {"float32": len(dense["tensors"])}


def test_people_get_tables_and_quiet_means_quiet(tiny, tmp_path, capsys):
    main(["quantize", str(tiny), "--to", str(tmp_path / "a"), "--recipe", "int8"])
    shown = capsys.readouterr().out
    assert (
        "int8-channel" in shown and "bits/weight" in shown and "kept in float" in shown
    )
    main(["inspect", str(tmp_path / "a"), "--quiet"])
    assert capsys.readouterr().out == ""


def test_json_goes_to_a_file_too(tiny, tmp_path):
    file = tmp_path / "found.json"
    assert main(["inspect", str(tiny), "--json", str(file)]) == 0
    assert json.loads(file.read_text())["format"] == "huggingface"


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--recipe", "int4g128"], "did you mean"),
        (["--recipe", "int4-g128"], "group of 128 is larger"),
        (["--revision", "main"], "is a local directory"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tiny, tmp_path, capsys, args, text):
    assert main(["quantize", str(tiny), "--to", str(tmp_path / "o"), *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qjax: error: ") and error.count("\n") == 1
    assert text in error


def test_texts_and_prompts_are_checked(tiny, tmp_path, capsys):
    text = tmp_path / "t.txt"
    text.write_text("short", "utf-8")
    assert main(["evaluate", str(tiny), "--text", str(text), "--context", "32"]) == 2
    assert "shorter than one window" in capsys.readouterr().err
    assert main(["evaluate", str(tiny), "--text", str(text), "--context", "9999"]) == 2
    assert "longer than the model's context of 64" in capsys.readouterr().err
    text.write_bytes(b"\xff\xfe\x00")
    assert main(["evaluate", str(tiny), "--text", str(text)]) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err
    assert main(["generate", str(tiny), "--prompt", ""]) == 2
    assert "prompt 0 is empty" in capsys.readouterr().err
    assert main(["generate", str(tiny), "--prompt", "a", "--max-tokens", "65"]) == 2
    assert "context" in capsys.readouterr().err


def test_unknown_verbs_and_options_exit_with_2(capsys):
    for args in (["quantise"], ["quantize", "x"], ["inspect", "x", "--bogus"]):
        with pytest.raises(SystemExit) as caught:
            main(args)
        assert caught.value.code == 2

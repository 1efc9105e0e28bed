"""`qjax plan`: JSON keys, what people see, exit statuses."""

import json

from qjax.cli import main

KEYS = {
    "device",
    "fits",
    "peak_bytes_per_device",
    "breakdown",
    "tokens_per_second_bound",
}


def test_json(capsys):
    arguments = ["plan", "llama-3-70b", "--device", "h200-8", "--mode", "finetune"]
    arguments += ["--batch", "8", "--lora.rank", "64", "--mesh.tensor", "2"]
    assert main([*arguments, "--optimizer.bits", "8", "--json", "-"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert set(made) >= KEYS and made["device"] == "h200-8" and made["fits"]
    assert sum(made["breakdown"].values()) == made["peak_bytes_per_device"]
    assert made["compiled"] is False and made["tokens_per_second_bound"] > 0


def test_people_get_a_table(capsys):
    assert main(["plan", "llama-3-8b", "--device", "l4", "--context", "1024"]) == 0
    out = capsys.readouterr().out
    assert "packed weights" in out and "peak" in out
    assert "serve on l4-1: fits (estimated); at most" in out
    assert "note: an estimate" in out


def test_bad_input_has_a_status(capsys):
    assert main(["plan", "llama-3-8b", "--device", "h1000"]) == 2
    assert "did you mean h100" in capsys.readouterr().err


def test_training_for_a_format_is_asked_for_by_its_options(capsys):
    arguments = ["plan", "llama-3-8b", "--device", "h200-8", "--mode", "finetune"]
    arguments += ["--batch", "8", "--qat.learn", "lsq", "--json", "-"]
    assert main(arguments) == 0
    parts = json.loads(capsys.readouterr().out)["breakdown"]
    assert parts["trained weights"] > 30 * parts["learned scales"] > 0

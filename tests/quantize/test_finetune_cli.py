"""`qjax finetune`: JSON keys, exit statuses, messages."""

import json
import os
import signal

import pytest

from qjax.cli import main

DENSE = ("--recipe", "none", "--lora.targets", "q", "down")  # quick to trace
FINETUNE = {"steps", "final_loss", "seconds", "peak_memory_bytes", "adapter"}


@pytest.fixture
def words(tmp_path, books_text):
    path = tmp_path / "words.txt"
    path.write_text(books_text[:3000], "utf-8")
    return path


@pytest.fixture
def run(tiny, words, tmp_path, capsys):
    """Runs two small steps over a model; more options may follow."""

    def call(*more, model=tiny, to=tmp_path / "out", json_to="-"):
        arguments = ["finetune", model, "--data", words, "--to", to, "--steps", 2]
        arguments += ["--batch", 2, "--data.context", 16, "--lora.rank", 2]
        arguments += ["--json", json_to, *more]
        status = main([*map(str, arguments)])
        captured = capsys.readouterr()
        made = json.loads(captured.out) if captured.out and json_to == "-" else {}
        return status, made, captured

    return call


def test_finetune_gives_its_json_keys_and_an_adapter_that_loads(run, tiny, tmp_path):
    status, made, _ = run("--data.eval-fraction", 0.2)
    assert status == 0 and set(made) >= FINETUNE and made["steps"] == 2
    assert made["adapter"] == str(tmp_path / "out" / "adapter")
    assert made["eval_perplexity"] > 1
    saved = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert saved["lora"]["rank"] == 2 and saved["data"]["context"] == 16
    arguments = ["generate", str(tiny), "--adapter", made["adapter"]]
    assert main([*arguments, "--prompt", "The sea", "--max-tokens", "2"]) == 0


def test_people_get_a_table_and_how_to_load_it(run, tmp_path):
    status, _, captured = run(*DENSE, json_to=tmp_path / "result.json")
    assert status == 0 and set(json.loads((tmp_path / "result.json").read_text()))
    assert "training loss" in captured.out
    assert f"--adapter {tmp_path / 'out' / 'adapter'}" in captured.out
    status, _, captured = run(
        *DENSE, "--quiet", "--force", json_to=tmp_path / "again.json"
    )
    assert status == 0 and captured.out == captured.err == ""


def test_the_command_line_goes_before_the_file(run, tmp_path):
    path = tmp_path / "config.json"
    spec = {"data": {"path": "x"}, "lora": {"rank": 8, "alpha": 4.0}, "save_every": 1}
    path.write_text(json.dumps(spec))
    assert run(*DENSE, "--config", path)[0] == 0
    made = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert (made["lora"]["rank"], made["lora"]["alpha"]) == (2, 4.0)
    assert made["save_every"] == 1 and made["data"]["path"].endswith("words.txt")


def test_a_signal_gives_its_status_and_resume_continues(run, monkeypatch, capsys):
    from qjax.train.trainer import Trainer

    save = Trainer._save

    def interrupted(self, checkpoints):
        first = self._saved is None
        save(self, checkpoints)
        if first:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_save", interrupted)
    with pytest.raises(SystemExit) as left:
        run(*DENSE, "--save-every", 1)
    assert left.value.code == 143
    assert json.loads(capsys.readouterr().out)["interrupted"] == "SIGTERM"
    monkeypatch.undo()
    status, made, _ = run(*DENSE, "--save-every", 1, "--resume")
    assert status == 0 and made["resumed_from"] == 1 and made["adapter"]


@pytest.mark.parametrize(
    "more, message",
    [
        (("--batch", "0"), "batch is 0; expected an integer from 1 on"),
        (("--epochs", "1"), "steps or epochs, not both"),
        (("--recipe", "nf5"), "unknown recipe 'nf5': did you mean nf4"),
        (("--data", "none.txt"), "none.txt"),
        (("--config", "none.json"), "none.json: no such file"),
        (("--data.context", "9999"), "data.context is 9999"),
    ],
)
def test_bad_input_gives_one_line_and_status_2(run, more, message):
    status, _, captured = run(*more)
    assert status == 2 and message in captured.err
    assert captured.err.startswith("qjax: error: ") and captured.err.count("\n") == 1


def test_a_setting_out_of_range_gives_status_2(run, capsys):
    with pytest.raises(SystemExit) as left:  # the parser's own error
        run("--optimizer.learning-rate", "0")
    assert left.value.code == 2
    assert "learning_rate" in capsys.readouterr().err


def test_a_quantized_model_is_not_quantized_again(run, tiny, tmp_path):
    out = str(tmp_path / "int8")
    main(["quantize", str(tiny), "--to", out, "--recipe", "int8", "--quiet"])
    status, _, captured = run("--recipe", "nf4", model=out)
    assert status == 2 and "is quantized already; leave it out" in captured.err


def test_loftq_over_a_quantized_model_reads_the_original(run, tiny, tmp_path):
    out = str(tmp_path / "int4")
    main(["quantize", str(tiny), "--to", out, "--recipe", "int4-g32", "--quiet"])
    loftq = ("--lora.init", "loftq", "--lora.targets", "q", "down")
    status, _, captured = run(*loftq, model=out)
    assert status == 2 and "say where they are with original=" in captured.err
    status, _, captured = run(*loftq, "--lora.original", tmp_path / "no", model=out)
    assert status == 2 and "no" in captured.err
    status, made, _ = run(*loftq, "--lora.original", tiny, model=out, to=tmp_path / "a")
    assert status == 0 and made["model"] is None
    status, again, _ = run(
        *loftq, "--recipe", "int4-g32", model=tiny, to=tmp_path / "b"
    )  # quantized on the way, the original is at hand
    assert status == 0 and again["final_loss"] == made["final_loss"]

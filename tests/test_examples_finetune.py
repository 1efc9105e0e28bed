"""The example of fine-tuning runs as written, on a smaller model and fewer books."""

import json
import re
import sys

from tests.test_examples import example
from tests.train.test_trainer import random_model

SMALL = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256}
SCORES = re.compile(r"^ +(instructions|books) +([\d.]+) +([\d.]+) +\(2 steps", re.M)


def test_finetune(root, model_path, calibration_text, tmp_path, monkeypatch, capsys):
    finetune, results = example(root, "finetune"), tmp_path / "results"
    model = random_model(tmp_path / "model", model_path, 0, **SMALL)
    books = tmp_path / "books.txt"
    books.write_text(calibration_text[:20000], "utf-8")
    monkeypatch.setattr(finetune, "MODEL", model)
    monkeypatch.setattr(finetune, "BOOKS", books)
    asked = ["finetune.py", "--results", str(results), "--steps", "2"]
    monkeypatch.setattr(sys, "argv", asked)
    finetune.main()
    written = capsys.readouterr().out
    assert [written.count(f"$ qjax {verb} ") for verb in ("finetune", "generate")] == [
        2,
        3,
    ]
    scores = SCORES.findall(written)
    assert [name for name, *_ in scores] == ["instructions", "books"]
    for name, before, after in scores:
        assert 1 < float(after) < float(before)
        settings = (results / name / "adapter" / "adapter_config.json").read_text()
        assert json.loads(settings)["base_model_name_or_path"] == str(model)
    answers = written.partition("answers of the model tuned on instructions:")[2]
    for instruction, word in finetune.QUESTIONS:
        assert f"  {instruction} {word}: " in answers

"""Two processes of four CPU devices each train as one, and move weights as bytes."""

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

import qjax
from qjax.train import finetune
from qjax.train.config import finetune_from_dict
from tests.train import small
from tests.train.test_trainer import random_model

COUNT = 2


def run(root, *more):
    """What both processes print."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "tests.train.distributed_worker", str(port)]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    started = [
        subprocess.Popen(
            [*command, str(COUNT), str(index), *map(str, more)],
            cwd=root,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(COUNT)
    ]
    results = []
    try:
        for one in started:
            out, errors = one.communicate(timeout=600)
            lines = [x for x in out.splitlines() if x.startswith("RESULT ")]
            assert one.returncode == 0 and lines, errors[-3000:]
            results.append(json.loads(lines[0].removeprefix("RESULT ")))
    finally:
        for one in started:
            one.kill()
            one.wait()
    return results


@pytest.mark.slow
def test_two_processes_train_as_one(root):
    step = small.step_of(small.model())
    state, measured = small.steps(step, small.batch())
    total, _ = step.evaluate(state.trainable, step.frozen, small.batch())
    adapter = state.trainable["layers"][0]["attn"]["q"]["lora"]["a"].get_value()

    results = run(root, 8)  # fsdp, over both processes
    assert [one["share"] for one in results] == [[0, 2], [1, 2]]
    for one in results:
        assert one["devices"] == 8
        np.testing.assert_allclose(one["measured"], measured, rtol=1e-5)
        np.testing.assert_allclose(one["loss"], float(total), rtol=1e-5)
        np.testing.assert_allclose(
            one["adapter"], float(np.abs(np.asarray(adapter)).sum()), rtol=1e-4
        )
        kinds = {kind for kind, _ in one["gathered"]}
        assert "u8" in kinds
        # No matrix of a layer moves as floats: the largest that do are the head
        # and factors of adapters.
        shapes = [
            tuple(map(int, shape.split(",")))
            for kind, shape in one["gathered"]
            if kind[0] in "fb"
        ]
        largest = sorted({int(np.prod(shape)) for shape in shapes})
        assert largest[-1] == 128 * 320 and largest[-2] <= 4 * 256


@pytest.mark.slow
def test_a_run_of_two_processes_is_that_of_one(root, model_path, tmp_path):
    """Losses, adapter, and a checkpoint that one process goes on from."""
    base = random_model(tmp_path / "base", model_path, 3)
    words = tmp_path / "words.txt"
    words.write_text("The old man looked out over the sea. " * 150, "utf-8")
    settings = {
        "data": {"path": str(words), "context": 16},
        "lora": {"rank": 2, "targets": ["q", "down"]},
        "optimizer": {"learning_rate": 0.05},
        "steps": 4,
        "batch": 8,
        "save_every": 2,
    }
    out = tmp_path / "two"
    asked = {"model": str(base), "settings": {**settings, "mesh": {"fsdp": -1}}}
    (tmp_path / "run.json").write_text(json.dumps({**asked, "output": str(out)}))
    first, second = run(root, 0, tmp_path / "run.json")
    assert first["final_loss"] == second["final_loss"]

    def alone(to, resume):
        model, tokenizer = qjax.load(base)
        config = finetune_from_dict(settings)
        return finetune(model, tokenizer, config, to, resume=resume)

    one = alone(tmp_path / "one", resume=False)
    np.testing.assert_allclose(first["final_loss"], one.final_loss, rtol=1e-5)
    same(out, tmp_path / "one")
    shutil.rmtree(out / "checkpoints" / "00000004")
    assert alone(out, resume=True).resumed_from == 2
    same(out, tmp_path / "one")


def same(*runs):
    """Compares adapters."""
    name = "adapter/adapter_model.safetensors"
    found, expected = (load_file(run / name) for run in runs)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, atol=1e-4)

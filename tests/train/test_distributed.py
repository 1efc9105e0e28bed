"""Two processes of four CPU devices each: the step of one process, and bytes moved."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.train import small

COUNT = 2


def run(root, fsdp):
    """What both processes print."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "tests.train.distributed_worker", str(port)]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    started = [
        subprocess.Popen(
            [*command, str(COUNT), str(index), str(fsdp)],
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

    results = run(root, fsdp=8)  # over both processes
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

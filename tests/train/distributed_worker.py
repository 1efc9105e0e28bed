"""One of several processes that train together: `PORT COUNT INDEX FSDP [RUN]`.

Prints, as JSON, what two steps measured, a sum of the trained values, and which floats
and bytes the compiled step gathers. With RUN, a JSON file of `model`, `settings` and
`output`, it fine-tunes instead, and prints the result.
"""

import json
import re
import sys
from pathlib import Path

import jax

from tests import fast_compiler


def join(port: int, count: int, index: int) -> None:
    """Joins the processes."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.distributed.initialize(f"localhost:{port}", count, index)
    fast_compiler.install()


def finetune(path: str) -> dict:
    """Trains as the file says."""
    import qjax
    from qjax.train import finetune
    from qjax.train.config import finetune_from_dict

    asked = json.loads(Path(path).read_text("utf-8"))
    model, tokenizer = qjax.load(asked["model"])
    config = finetune_from_dict(asked["settings"])
    return finetune(model, tokenizer, config, asked["output"]).to_dict()


def steps(fsdp: int) -> dict:
    """Trains on this process's rows."""
    import jax.numpy as jnp

    from qjax.train.mesh import Mesh, make_mesh, process_share
    from tests.train import small

    mesh = make_mesh(Mesh(data=-1, fsdp=fsdp))
    made = small.model()
    step = small.step_of(made, mesh)
    place, parts = process_share(mesh)
    rows = small.ROWS // parts
    batch = small.batch(rows, place * rows)
    compiled = step.lower(step.placed(batch)).compile()
    state, measured = step.init(jax.random.key(0)), []
    for _ in range(2):
        state, metrics = compiled(state, step.frozen, step.placed(batch))
        measured.append([float(metrics.loss), float(metrics.grad_norm)])
    total, _ = step.evaluate(state.trainable, step.frozen, batch)
    step.install(state)
    adapter = made.layers[0].attn.q.lora.a.get_value()
    gathered = re.findall(
        r"= ([a-z0-9]+)\[([0-9,]*)\]\S* all-gather", compiled.as_text()
    )
    return {
        "devices": jax.device_count(),
        "share": [place, parts],
        "measured": measured,
        "loss": float(total),
        "adapter": float(jnp.sum(jnp.abs(jnp.asarray(jax.device_get(adapter))))),
        "gathered": sorted({(kind, shape) for kind, shape in gathered}),
    }


if __name__ == "__main__":
    *numbers, fsdp = map(int, sys.argv[1:5])
    join(*numbers)
    result = finetune(sys.argv[5]) if sys.argv[5:] else steps(fsdp)
    print("RESULT " + json.dumps(result), flush=True)

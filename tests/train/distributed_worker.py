"""One of several processes of a training step: `PORT COUNT INDEX FSDP`.

Prints, as JSON, what two steps measured, a sum of the trained values, and which floats
and bytes the compiled step gathers.
"""

import json
import re
import sys

import jax


def main(port: int, count: int, index: int, fsdp: int) -> None:
    """Joins, trains on this process's rows, prints."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.distributed.initialize(f"localhost:{port}", count, index)
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
    result = {
        "devices": jax.device_count(),
        "share": [place, parts],
        "measured": measured,
        "loss": float(total),
        "adapter": float(jnp.sum(jnp.abs(jax.numpy.asarray(jax.device_get(adapter))))),
        "gathered": sorted({(kind, shape) for kind, shape in gathered}),
    }
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

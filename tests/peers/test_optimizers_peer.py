"""AdamW and Lion of `qjax.train.fused` beside bitsandbytes' optimizers on CPU.

bitsandbytes holds a tensor per layer, qjax a stack of them; both get the same gradients
for several steps from zero states. At least 95 % of codes must be within one of theirs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.train.fused import adamw, lion

torch = pytest.importorskip("torch")
optim = pytest.importorskip("bitsandbytes.optim")

RULES = {
    "adamw": (adamw, "AdamW8bit", (0.9, 0.999)),
    "lion": (lion, "Lion8bit", (0.9, 0.99)),
}
RATE, DECAY, STEPS = 1e-2, 0.1, 8


@pytest.mark.parametrize("rule", RULES)
def test_several_steps_of_a_stack(rule):
    make, name, betas = RULES[rule]
    rng = np.random.default_rng(0)
    stack = rng.standard_normal((3, 64, 96)).astype(np.float32)
    small = rng.standard_normal((50, 60)).astype(np.float32)  # float32 states in both
    mean = rng.standard_normal(stack.shape)
    theirs = [torch.nn.Parameter(torch.from_numpy(x.copy())) for x in (*stack, small)]
    peer = getattr(optim, name)(theirs, lr=RATE, betas=betas, weight_decay=DECAY)
    tx = make(RATE, weight_decay=DECAY)
    params = {"stack": jnp.asarray(stack), "small": jnp.asarray(small)}
    state, step = tx.init(params), jax.jit(tx.apply)
    for _ in range(STEPS):
        noise = 0.3 * rng.standard_normal(stack.shape)
        g = (mean + noise).astype(np.float32)
        h = rng.standard_normal(small.shape).astype(np.float32)
        for tensor, slope in zip(theirs, (*g, h), strict=True):
            tensor.grad = torch.from_numpy(slope.copy())
        peer.step()
        grads = {"stack": jnp.asarray(g), "small": jnp.asarray(h)}
        params, state = step(params, grads, state)

    *layers, last = theirs
    for i, moment in enumerate(state.moments["stack"], 1):
        found = [peer.state[x] for x in layers]
        codes = np.stack([x[f"state{i}"].numpy() for x in found])
        apart = np.abs(np.int32(moment.codes) - np.int32(codes))
        assert np.mean(apart <= 1) >= 0.95
        assert np.mean(apart == 0) >= 0.95
        maxima = np.stack([x[f"absmax{i}"].numpy() for x in found])
        np.testing.assert_allclose(moment.absmax, maxima, rtol=1e-4)
    gap = np.abs(params["stack"] - np.stack([x.detach().numpy() for x in layers]))
    assert np.mean(gap) < 0.01 * RATE
    np.testing.assert_allclose(params["small"], last.detach().numpy(), atol=2e-6)
    assert peer.state[last]["state1"].dtype == torch.float32
    assert state.moments["small"].m.dtype == jnp.float32

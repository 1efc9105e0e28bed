"""8-bit AdamW and Lion against bitsandbytes' blockwise optimizers on CPU.

Both take the same gradients. bitsandbytes' CPU encoder looks moments up on a grid of
about 2**-16 of the largest one of the block, so that its codes of small second moments
are often not the nearest, by up to a cell; qjax's are. One step from bitsandbytes' own
state must give its parameters, and codes that are as near as its own or nearer; over
several steps from zeros parameters and decoded moments must stay close.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.pallas_kernels.optimizer import api, dynamic

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes.functional")

GRID = 2.0**-15
RATE, DECAY, SHAPE = 1e-2, 0.1, (7, 300)
RULES = {
    "adamw": (api.adamw8, "adam", (0.9, 0.999), {"eps": 1e-8}),
    "lion": (api.lion8, "lion", (0.9, 0.99), {}),
}


class Peer:
    """A parameter and its state in bitsandbytes."""

    def __init__(self, rule, p):
        self.rule, self.p = rule, torch.from_numpy(p.copy())
        self.moments, blocks = [], -(-p.size // 256)
        for signed in (True, False)[: 2 if rule == "adamw" else 1]:
            table = torch.from_numpy(dynamic.table(signed).copy())
            codes = torch.full(p.shape, dynamic.ZERO[signed], dtype=torch.uint8)
            self.moments.append((codes, table, torch.zeros(blocks)))

    def step(self, g, count):
        """One update in place."""
        _, name, (b1, b2), _ = RULES[self.rule]
        (codes, table, absmax), *second = self.moments
        codes2, table2, absmax2 = second[0] if second else (None, None, None)
        bnb.optimizer_update_8bit_blockwise(
            *(name, torch.from_numpy(g), self.p, codes, codes2),
            *(b1, b2, 0.0, 0.0, 1e-8, count, RATE),
            *(table, table2, absmax, absmax2),
            weight_decay=DECAY,
        )

    def state(self):
        """The state as qjax holds it."""
        moments = [
            api.Moment8(jnp.asarray(c.numpy().copy()), jnp.asarray(a.numpy().copy()))
            for c, _, a in self.moments
        ]
        return (api.AdamW8 if self.rule == "adamw" else api.Lion8)(*moments)


def step(rule, p, g, state, count):
    """One update by qjax with the same constants."""
    update, _, (b1, b2), options = RULES[rule]
    options = options | ({"count": count} if rule == "adamw" else {})
    return update(
        jnp.asarray(p),
        jnp.asarray(g),
        state,
        learning_rate=RATE,
        b1=b1,
        b2=b2,
        weight_decay=DECAY,
        **options,
    )


def gradients(seed, count):
    """Gradients whose sizes differ between elements and steps, seldom near zero."""
    rng = np.random.default_rng(seed)
    mean = rng.standard_normal(SHAPE)
    noise = rng.standard_normal((count, *SHAPE))
    return list(np.float32(mean + 0.3 * noise))


@pytest.mark.parametrize("rule", RULES)
def test_several_steps(rule):
    p = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    peer, state, mine = Peer(rule, p), api.init8(jnp.asarray(p), rule), p
    for count, g in enumerate(gradients(1, 8), 1):
        peer.step(g, count)
        mine, state = step(rule, mine, g, state, count)
    theirs = peer.state()
    gap = np.abs(np.asarray(mine) - peer.p.numpy())
    # In steps, of which there were eight: a neighbour of a small code changes a few.
    assert np.mean(gap) < 0.005 * RATE
    assert np.max(gap) < RATE
    for i, (a, b) in enumerate(zip(state, theirs, strict=True)):
        a, b = (np.asarray(api.moment(m, signed=i == 0)) for m in (a, b))
        assert np.mean(np.abs(a - b)) < 1e-3 * np.mean(np.abs(b))


@pytest.mark.parametrize("rule", RULES)
def test_a_step_from_their_state(rule):
    """Parameters to rounding; codes at least as near to the moment as theirs."""
    p = np.random.default_rng(2).standard_normal(SHAPE).astype(np.float32)
    peer = Peer(rule, p)
    *before, last = gradients(3, 4)
    for count, g in enumerate(before, 1):
        peer.step(g, count)
    old = peer.state()
    mine, state = step(rule, peer.p.numpy().copy(), last, old, 4)
    peer.step(last, 4)
    np.testing.assert_allclose(mine, peer.p.numpy(), rtol=1e-5, atol=1e-6)
    decays = RULES[rule][2] if rule == "adamw" else RULES[rule][2][1:]
    for i, (a, b, was) in enumerate(zip(state, peer.state(), old, strict=True)):
        np.testing.assert_allclose(a.absmax, b.absmax, rtol=1e-5)
        u = np.float64(api.moment(was, signed=i == 0)) * decays[i]
        u = (u + (1 - decays[i]) * np.float64(last) ** (i + 1)).ravel()
        u = u / np.repeat(np.float64(b.absmax), 256)[: u.size]
        table = np.float64(dynamic.table(i == 0))
        near, peers = (np.abs(table[np.ravel(m.codes)] - u) for m in (a, b))
        assert (near <= peers + 1e-6).all()
        assert (peers <= near + GRID).all()

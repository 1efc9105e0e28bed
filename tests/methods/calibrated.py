"""Weights with correlated inputs, for methods that are calibrated."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from qjax.methods import Statistics


def correlated(rng, size, tokens=400):
    """Inputs `[tokens, size]` with a falling spectrum and unequal features."""
    mix = rng.normal(size=(size, size)) * np.geomspace(1, 0.1, size)[:, None]
    x = rng.normal(size=(tokens, size)) @ mix
    return (x * rng.uniform(0.3, 2.0, size)).astype(np.float32)


def statistics_of(x, reference=None):
    """Statistics of inputs, in float64 rounded once."""
    x = x.astype(np.float64)
    made = Statistics.zeros(x.shape[1])
    cross = None if reference is None else reference.astype(np.float64).T @ x
    return dataclasses.replace(
        made,
        count=jnp.asarray(float(len(x)), jnp.float32),
        square=jnp.asarray(np.sum(x * x, 0), jnp.float32),
        hessian=jnp.asarray(x.T @ x, jnp.float32),
        cross=None if cross is None else jnp.asarray(cross, jnp.float32),
    )


def output_error(x, w, q, reference=None):
    """Squared error of `x q` relative to the outputs of the original."""
    exact = (x if reference is None else reference) @ w
    return float(
        np.sum((x @ np.asarray(q.dequantize()) - exact) ** 2) / np.sum(exact**2)
    )

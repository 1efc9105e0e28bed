"""GPTQ line by line as in its original implementation, in NumPy.

Reference: `gptq.py` and `quant.py` of https://github.com/IST-DASLab/gptq (Apache-2.0):
upper Cholesky factor of the inverse Hessian, columns of `W [out, in]` rounded one by
one, the rest of a block updated after every column, the rest of the matrix after every
block. Two deviations: dead inputs keep their weights, and `sorted_groups` orders groups
and their members as GPTQModel's `act_group_aware` does.
"""

import numpy as np
import scipy.linalg


class Quantizer:
    """Min-max grid of one group: `quant.py`, `find_params` and `quantize`."""

    def __init__(self, bits: int, sym: bool):
        self.maxq, self.sym = np.float32(2**bits - 1), sym

    def find_params(self, x):
        zeros = np.zeros(x.shape[0], np.float32)
        xmin = np.minimum(x.min(1), zeros)
        xmax = np.maximum(x.max(1), zeros)
        if self.sym:
            xmax = np.maximum(np.abs(xmin), xmax)
            xmin = np.where(xmin < 0, -xmax, xmin)
            if (xmin == 0).all():
                xmin = -xmax
        dead = (xmin == 0) & (xmax == 0)
        xmin = np.where(dead, np.float32(-1), xmin)
        xmax = np.where(dead, np.float32(1), xmax)
        self.scale = ((xmax - xmin) / self.maxq).astype(np.float32)
        if self.sym:
            self.zero = np.full_like(self.scale, (self.maxq + 1) / 2)
        else:
            self.zero = np.round(-xmin / self.scale)

    def quantize(self, x):
        q = np.clip(np.round(x / self.scale) + self.zero, 0, self.maxq)
        return self.scale * (q - self.zero)


def gptq(
    weight,
    hessian,
    *,
    bits,
    group,
    sym=False,
    percdamp=0.01,
    blocksize=128,
    actorder=False,
    static_groups=False,
    sorted_groups=False,
):
    """`fasterquant`: the dequantized weight `[in, out]` for `[in, out]`."""
    w = weight.T.astype(np.float32).copy()
    h = hessian.astype(np.float32).copy()
    columns = w.shape[1]
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    groups = []
    if static_groups:
        for i in range(0, columns, group):
            groups.append(Quantizer(bits, sym))
            groups[-1].find_params(w[:, i : i + group])
    perm = np.arange(columns)
    if sorted_groups:
        diag = np.diag(h).reshape(-1, group)
        inside = np.argsort(-diag, axis=1, kind="stable")
        order = np.argsort(-diag.max(1), kind="stable")
        perm = (inside + np.arange(len(diag))[:, None] * group)[order].reshape(-1)
    elif actorder:
        perm = np.argsort(-np.diag(h), kind="stable")
    if sorted_groups or actorder:
        w, h = w[:, perm], h[perm][:, perm]
    losses, q_all = np.zeros_like(w), np.zeros_like(w)
    damp = percdamp * np.mean(np.diag(h))
    h[np.arange(columns), np.arange(columns)] += damp
    h = scipy.linalg.cholesky(h, lower=True)
    h = scipy.linalg.cho_solve((h, True), np.eye(columns, dtype=np.float32))
    hinv = scipy.linalg.cholesky(h, lower=False)
    quantizer = Quantizer(bits, sym)
    if group is None:
        quantizer.find_params(w)
    for i1 in range(0, columns, blocksize):
        i2 = min(i1 + blocksize, columns)
        w1 = w[:, i1:i2].copy()
        q1, err1 = np.zeros_like(w1), np.zeros_like(w1)
        hinv1 = hinv[i1:i2, i1:i2]
        for i in range(i2 - i1):
            column, d = w1[:, i], hinv1[i, i]
            if group is not None:
                if static_groups:
                    quantizer = groups[perm[i1 + i] // group]
                elif (i1 + i) % group == 0:
                    quantizer.find_params(w[:, i1 + i : i1 + i + group])
            q = quantizer.quantize(column)
            q1[:, i] = q
            losses[:, i1 + i] = (column - q) ** 2 / d**2
            err = (column - q) / d
            w1[:, i:] -= err[:, None] * hinv1[i, i:][None]
            err1[:, i] = err
        q_all[:, i1:i2] = q1
        w[:, i2:] -= err1 @ hinv[i1:i2, i2:]
    return q_all[:, np.argsort(perm)].T

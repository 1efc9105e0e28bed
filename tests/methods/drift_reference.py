"""GPTAQ and Qronos line by line in NumPy, for grids that are known beforehand.

References: `gptaq.py` of https://github.com/Intelligent-Computing-Lab-Panda/GPTAQ,
`fasterquant`; Qronos (arXiv 2505.11695), algorithm 1: after every rounded row all rows
behind it are the least squares solution given the rounded ones.
"""

import numpy as np


def gptaq(weight, h, cross, quantize, *, alpha, percdamp=0.01):
    """The dequantized weight `[in, out]`; `quantize(row_index, row) -> values`."""
    w, h = weight.astype(np.float64).T.copy(), h.astype(np.float64).copy()
    columns = w.shape[1]
    dxx = cross.astype(np.float64) - h  # sum of (fp_inp - inp) inp^T
    h[np.arange(columns), np.arange(columns)] += percdamp * np.mean(np.diag(h))
    hinv = np.linalg.cholesky(np.linalg.inv(h)).T
    p = alpha * np.triu(dxx @ hinv.T, 1) @ hinv
    out = np.zeros_like(w)
    for i in range(columns):
        column, d = w[:, i].copy(), hinv[i, i]
        q = quantize(i, column)
        out[:, i] = q
        err = (column - q) / d
        w[:, i:] -= np.outer(err, hinv[i, i:]) - np.outer(column, p[i, i:])
    return out.T


def qronos(weight, h, cross, quantize, *, percdamp=0.01):
    """The dequantized weight `[in, out]`; `quantize(row_index, row) -> values`."""
    h, g = h.astype(np.float64).copy(), cross.astype(np.float64).T.copy()
    rows = len(h)
    damp = percdamp * np.mean(np.diag(h))
    h[np.arange(rows), np.arange(rows)] += damp
    g[np.arange(rows), np.arange(rows)] += damp
    w = weight.astype(np.float64).copy()
    aim = g @ w  # x^T r w
    out = np.zeros_like(w)
    for i in range(rows):
        rest = np.arange(i + 1, rows)
        # The best value of row i with the rows before rounded, those behind as they are
        best = (aim[i] - h[i, :i] @ out[:i] - h[i, rest] @ w[rest]) / h[i, i]
        out[i] = quantize(i, best)
        if len(rest):  # ... and the best of all rows behind, now that it is rounded
            right = aim[rest] - h[np.ix_(rest, range(i + 1))] @ out[: i + 1]
            w[rest] = np.linalg.solve(h[np.ix_(rest, rest)], right)
    return out

"""AWQ line by line as in AutoAWQ 0.2.9, in NumPy.

Reference: `awq/quantize/quantizer.py` of https://github.com/casper-hansen/AutoAWQ
(MIT): `pseudo_quantize_tensor`, `_search_best_scale`, `_search_best_clip`. The
error of a module's output is the sum of the errors of its linear layers here.
"""

import numpy as np


def pseudo_quantize(w, bits, group):
    shape = w.shape
    w = w.reshape(-1, group)
    top, low = w.max(1, keepdims=True), w.min(1, keepdims=True)
    levels = 2**bits - 1
    scales = np.maximum(top - low, 1e-5) / levels
    zeros = np.clip(-np.round(low / scales), 0, levels)
    q = (np.clip(np.round(w / scales) + zeros, 0, levels) - zeros) * scales
    return q.reshape(shape)


def autoawq_scale(x, weights, bits, group, grid=20, duo=True, x_mean=None):
    weight = np.concatenate(weights)  # [out, in]
    shape = weight.shape
    w = np.abs(weight).reshape(-1, group)
    w_mean = (w / (w.max(1, keepdims=True) + 1e-6)).reshape(shape).mean(0)
    x_mean = np.abs(x).mean(0) if x_mean is None else x_mean
    best, best_scales = np.inf, None
    for ratio in range(grid):
        ratio = ratio / grid
        if duo:
            scales = np.maximum(x_mean**ratio / (w_mean ** (1 - ratio) + 1e-4), 1e-4)
        else:
            scales = np.maximum(x_mean**ratio, 1e-4)
        scales = scales / np.sqrt(scales.max() * scales.min())
        loss = 0.0
        for m in weights:
            q = pseudo_quantize(m * scales, bits, group) / scales
            loss += np.sum((x @ m.T - x @ q.T) ** 2)
        if loss < best:
            best, best_scales = loss, scales
    return best_scales


def autoawq_clip(w, x, bits, group, n_grid=20, max_shrink=0.5):
    tokens, out = x.shape[0], w.shape[0]
    features = x.reshape(1, tokens, -1, group)
    w = w.reshape(out, 1, -1, group)
    top = np.abs(w).max(-1, keepdims=True)
    best_top, least = top.copy(), np.full_like(top, 1e9)
    org_out = (features * w).sum(-1)
    for i in range(int(max_shrink * n_grid)):
        max_val = top * (1 - i / n_grid)
        cur_w = np.clip(w, -max_val, max_val)
        cur_out = (features * pseudo_quantize(cur_w, bits, group)).sum(-1)
        err = np.square(cur_out - org_out).mean(1).reshape(least.shape)
        better = err < least
        least[better] = err[better]
        best_top[better] = max_val[better]
    return np.clip(w, -best_top, best_top).reshape(out, -1)


def autoawq(x, w, scales, bits, group):
    """The dense weight, `[in, out]`, that AutoAWQ would store."""
    x, turned = x.astype(np.float64), w.T.astype(np.float64)
    clipped = [
        autoawq_clip(rows * scales, x / scales, bits, group)
        for rows in np.array_split(turned, -(-len(turned) // 64))
    ]
    return (pseudo_quantize(np.concatenate(clipped), bits, group) / scales).T

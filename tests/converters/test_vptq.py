"""VPTQ layers, packed and decoded by loops as the format describes them."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.additive import AdditiveTensor
from qjax.converters.packed import check_parts
from qjax.converters.vptq import VPTQ
from qjax.errors import FormatError, QjaxError, UnsupportedError
from qjax.ops import matmul
from qjax.wrappers import LowRank, Permuted, RowParts, Transposed

COLS = 24
NAME = "model.layers.0.mlp.up_proj"


def bit_string(fields, total: int) -> np.ndarray:
    """int32 words of a little-endian bit string."""
    whole = sum(int(field) << total * i for i, field in enumerate(fields))
    count = -(-len(fields) * total // 32)
    words = [whole >> 32 * i & 0xFFFFFFFF for i in range(count)]
    return np.array(words, np.uint32).view(np.int32)


def draw(
    main=256,
    more=-1,
    vector=8,
    groups=1,
    size=20,
    outliers=0,
    packed=True,
    perm=np.int16,
    norm=True,
    dtype="float16",
):
    """Settings, a layer, and its weight `[in, out]`."""
    rng = np.random.default_rng(main + size)
    rows = outliers + groups * size
    own = {
        "vector_lens": [4 if outliers else -1, vector],
        "num_centroids": [16 if outliers else -1, main],
        "num_res_centroids": [-1, more],
        "group_num": groups,
        "group_size": size,
        "outlier_size": outliers,
        "in_features": rows,
        "out_features": COLS,
        "is_indice_packed": packed,
    }

    def books(groups, levels, length):
        return rng.normal(size=(groups, levels * length)).astype(jnp.dtype(dtype))

    parts = {"centroids.weight": books(groups, main, vector)}
    shape = (groups, COLS // vector, size)
    index, rest = rng.integers(0, main, shape), np.zeros(shape, int)
    w = np.zeros((COLS, rows), np.float32)

    def place(table, index, length, start):
        """One group of inputs: column `c` of the codes is input `start + c`."""
        for v in range(index.shape[0]):
            for c in range(index.shape[1]):
                for k in range(length):
                    value = np.float32(table[index[v, c] * length + k])
                    w[v * length + k, start + c] += value

    for i in range(groups):
        place(parts["centroids.weight"][i], index[i], vector, outliers + i * size)
    if more > 0:
        parts["res_centroids.weight"] = books(groups, more, vector)
        rest = rng.integers(0, more, shape)
        for i in range(groups):
            table = parts["res_centroids.weight"][i]
            place(table, rest[i], vector, outliers + i * size)
    if packed:
        low, high = (max(n - 1, 0).bit_length() for n in (main, max(more, 0)))
        fields = index | rest << low
        parts["indices"] = np.array(
            [[bit_string(row, low + high) for row in group] for group in fields]
        )
    else:
        parts["indices"] = index.astype(np.uint16).view(np.int16)
        if more > 0:
            parts["res_indices"] = rest.astype(np.uint16).view(np.float16)
    if outliers:
        parts["outlier_centroids.weight"] = books(1, 16, 4)
        index = rng.integers(0, 16, (1, COLS // 4, outliers))
        parts["outlier_indices"] = index.astype(np.int16)
        place(parts["outlier_centroids.weight"][0], index[0], 4, 0)
    if perm is not None:
        order = rng.permutation(rows)
        w = w[:, np.argsort(order)]
        parts["perm"] = order.astype(perm)
    if norm:
        scale, bias = rng.normal(size=(2, rows)).astype(jnp.dtype(dtype))
        w = w * np.float32(scale) + np.float32(bias)
        parts |= {"weight_scale": scale, "weight_bias": bias}
    return {"config_for_layers": {NAME: own}}, parts, w.T


CASES = {
    "plain": {"norm": False, "perm": None},
    "one codebook": {},
    "two of one size": {"more": 256},
    "a smaller residual": {"main": 4096, "more": 256, "vector": 6},
    "a larger residual": {"main": 16, "more": 1024, "vector": 12},
    "groups": {"groups": 3, "size": 7, "more": 8, "main": 512, "dtype": "bfloat16"},
    "outliers": {"outliers": 5, "size": 11, "perm": np.int64, "main": 1024},
    "not packed": {"packed": False, "more": 32, "main": 512, "outliers": 2},
}


def read(settings, parts):
    reader = VPTQ(settings, "here")
    check_parts(reader, parts, "here: layer")
    return reader.read(parts, f"here: {NAME}")


@pytest.mark.parametrize("case", CASES)
def test_values(case):
    settings, parts, w = draw(**CASES[case])
    assert VPTQ(settings, "here").shape(parts) == w.shape[::-1]
    q = read(settings, parts)
    assert q.shape == w.shape
    tolerance = 1e-6 * np.abs(w).max()
    np.testing.assert_allclose(q.dequantize("float32"), w, atol=tolerance)
    x = np.random.default_rng(0).normal(size=(3, len(w))).astype(np.float32)
    np.testing.assert_allclose(matmul(x, q), x @ w, atol=1e-4)
    assert q.dtype == CASES[case].get("dtype", "float16")


def test_classes():
    q = read(*draw()[:2])
    assert isinstance(q, LowRank) and isinstance(q.base, Permuted)
    assert isinstance(q.base.base, Transposed)
    assert isinstance(q.base.base.base, AdditiveTensor)
    assert q.base.base.base.codes.dtype == np.uint8
    two = read(*draw(**CASES["two of one size"])[:2]).base.base
    assert isinstance(two, Transposed) and two.base.format.codebooks == 2
    parts = read(*draw(**CASES["a smaller residual"])[:2]).base.base
    assert isinstance(parts, RowParts) and parts.starts == (0, 0)
    widths = [part.base.codes.dtype for part in parts.parts]
    assert sorted(map(str, widths)) == ["uint16", "uint8"]


def test_settings_shared_by_layers():
    settings, parts, w = draw()
    own = settings["config_for_layers"][NAME]
    q = read({"shared_layer_config": {"mlp.up_proj": own}}, parts)
    np.testing.assert_allclose(q.dequantize("float32"), w, atol=1e-5)
    with pytest.raises(FormatError, match="config_for_layers does not name it"):
        read({"shared_layer_config": {"proj": own}}, parts)
    both = {"other": {**own, "vector_lens": [-1, 4]}, NAME: own}
    reader = VPTQ({"config_for_layers": both}, "here")
    assert reader.shape(parts) == (COLS, 20)


def test_unfit_layers():
    settings, good, _ = draw(more=16, outliers=4)
    twice = good["perm"].copy()
    twice[0] = twice[1]
    for change, message in (
        ({"perm": twice}, "perm: is not a permutation of 0..23"),
        ({"perm": twice[1:]}, r"perm has shape \[23\], not \[24\]"),
        ({"indices": good["indices"][..., 1:]}, "indices has shape"),
        ({"centroids.weight": good["centroids.weight"][:, 1:]}, "centroids.weight has"),
        (
            {"res_indices": good["indices"]},
            "res_indices is missing, or has no settings",
        ),
        ({"outlier_indices": good["outlier_indices"] + np.int16(16)}, "outside 0..15"),
        (
            {"outlier_indices": good["outlier_indices"].astype(int)},
            "is int64, expected",
        ),
    ):
        with pytest.raises(FormatError, match=message):
            read(settings, {**good, **change})
    del good["outlier_indices"]
    with pytest.raises(FormatError, match="outlier_indices is missing"):
        read(settings, good)
    with pytest.raises(ValueError, match=r"no layer of the settings: outlier_indices"):
        VPTQ(settings, "here").shape(good)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vector_quant_dim": "in"}, UnsupportedError, "along `in` are not read"),
        ({"num_centroids": [-1, 300]}, UnsupportedError, "300 vectors per codebook"),
        ({"vector_lens": 8.5}, FormatError, "vector_lens is 8.5"),
        ({"vector_lens": [8]}, FormatError, r"vector_lens is \[8\]"),
        ({"group_num": 3}, UnsupportedError, "with 3 groups of 20 inputs"),
        ({"out_features": 0}, UnsupportedError, "in=20, out=0"),
        ({"out_features": 21}, UnsupportedError, "vectors of 8 outputs do not divide"),
        ({"num_res_centroids": [-1, 2**17]}, UnsupportedError, "131072 vectors"),
    ],
)
def test_unread_settings(change, error, message):
    settings, parts, _ = draw()
    settings["config_for_layers"][NAME] |= change
    with pytest.raises(error, match=message):
        read(settings, parts)


@pytest.mark.parametrize(
    "settings",
    [{}, {"config_for_layers": 3}, {"config_for_layers": {NAME: 3}}],
)
def test_no_settings(settings):
    with pytest.raises(QjaxError, match="config_for_layers"):
        VPTQ(settings, "here")

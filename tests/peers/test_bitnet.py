"""BitNet layers against those of transformers."""

import numpy as np
import pytest

from qjax.converters.bitnet import BitNet
from qjax.ops import matmul

torch = pytest.importorskip("torch")
bitnet = pytest.importorskip("transformers.integrations.bitnet")
ROWS, COLS = 48, 32


@pytest.mark.parametrize("linear", ["bitlinear", "autobitlinear"])
def test_products(linear):
    rng = np.random.default_rng(0)
    ternary = torch.from_numpy(rng.integers(-1, 2, (COLS, ROWS)))
    packed = bitnet.pack_weights(ternary.clone())
    scale = torch.tensor([2.7])
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        if linear == "bitlinear":
            layer = bitnet.BitLinear(ROWS, COLS, bias=False, dtype=torch.float32)
            layer.weight.copy_(packed)
        else:
            layer = bitnet.AutoBitLinear(ROWS, COLS, bias=False, dtype=torch.float32)
            layer.weight.copy_(bitnet.unpack_weights(packed, torch.float32))
        layer.weight_scale.copy_(scale)
        x = torch.from_numpy(rng.normal(size=(5, ROWS)).astype(np.float32))
        want = layer(x).numpy()
    reader = BitNet({"linear_class": linear}, "here")
    parts = {"weight": packed.numpy(), "weight_scale": scale.numpy()}
    q = reader.read(parts, "here: layer")
    w = np.asarray(q.dequantize("float32"))
    np.testing.assert_array_equal(np.sign(w), ternary.numpy().T)
    np.testing.assert_allclose(matmul(x.numpy(), q), want, rtol=2e-6, atol=2e-6)

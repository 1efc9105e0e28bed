"""AutoRound checkpoints: the layouts of GPTQ and AWQ under settings of its own.

`packing_format` says which: with `gptq` in it (`auto_round:auto_gptq`) GPTQ with
zero-points minus one, with `awq` AWQ's GEMM layout, otherwise (`auto_round`,
`auto_round:exllamav2`) GPTQ with zero-points as they are. `g_idx` is absent.
`extra_config` holds what is different for some layers.

Reference: auto-round `export/export_to_autoround/export.py`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.awq import AWQ
from qjax.converters.gptq import GPTQ
from qjax.converters.overrides import Overrides, layer_name
from qjax.errors import UnsupportedError
from qjax.tensor import QuantizedTensor


class AutoRound:
    """Reads the layers of one checkpoint; see `qjax.converters.gptq.GPTQ`."""

    kind, marks, parts, stated = "auto-round", ("qweight",), GPTQ.parts, ()

    def __init__(self, settings: Mapping[str, Any], where: str):
        packing = settings.get("packing_format", settings.get("backend", "auto_round"))
        if not isinstance(packing, str) or not packing.startswith("auto_round"):
            raise UnsupportedError(
                f"{where}: AutoRound packing_format {packing!r:.200} is not read; "
                "expected one that starts with auto_round"
            )
        self._layout = "gptq" if "gptq" in packing else "gptq_v2"
        self._layout = "awq" if "awq" in packing else self._layout
        self._where = where
        self._overrides = Overrides.of_auto_round(settings, where)
        self._whole = self._layer(self._overrides.whole)

    def _layer(self, settings: Mapping[str, Any]) -> GPTQ | AWQ:
        kind = settings.get("data_type", "int")
        if kind != "int":
            raise UnsupportedError(
                f"{self._where}: AutoRound data_type {kind!r:.200} is not read; "
                "expected int"
            )
        names = ("bits", "group_size", "sym")
        own = {name: settings[name] for name in names if name in settings}
        if self._layout == "awq":
            return AWQ(own, self._where)
        meta = {"checkpoint_format": self._layout, "meta": "gptqmodel"}
        return GPTQ(own | meta, self._where)

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; see `Reader.shape`."""
        return self._whole.shape(parts)

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`; see `affine`."""
        return self._layer(self._overrides.of(layer_name(where))).read(parts, where)

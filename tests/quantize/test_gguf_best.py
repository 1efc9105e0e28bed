"""GGUF files whose blocks are better than llama.cpp's."""

import pytest

import qjax
import qjax.convert_gguf
from qjax.errors import SpecError
from qjax.recipes import preset


class _Seen(Exception):
    """Ends a conversion where quantization begins."""


@pytest.mark.parametrize("name", ["q4_k_m-best", "Q4_K_M"])
def test_the_names_of_files(tiny, tmp_path, monkeypatch, name):
    def quantized(source, target, recipe, **options):
        assert (recipe.mixture, recipe.best) == ("Q4_K_M", "best" in name)
        assert recipe == preset(name.upper())
        raise _Seen

    monkeypatch.setattr(qjax.convert_gguf, "quantize_checkpoint", quantized)
    with pytest.raises(_Seen):
        qjax.convert(tiny, tmp_path / "m.gguf", f"gguf:{name}")


def test_only_presets_have_better_blocks(tiny, tmp_path):
    with pytest.raises(SpecError, match=r"F16-BEST: expected .*; or a preset with -be"):
        qjax.convert(tiny, tmp_path / "m.gguf", "gguf:F16-best")

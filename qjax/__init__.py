"""qjax: quantized large language models in JAX.

A quantized weight is a pytree, and every operation on it is a pure function:

    q = qjax.quantize(w, qjax.NF4(block=64, double=True))
    y = qjax.matmul(x, q)
    model, tokenizer = qjax.load("path or Hub id")
    qmodel = qjax.quantize_model(model, "int4-g128")
    qjax.save(qmodel, "out/")
    text = qjax.generate(qmodel, tokenizer, "Once", max_tokens=64)
"""

from qjax import calibration as calibration
from qjax import evaluate as evaluate
from qjax import models as models
from qjax import nn as nn
from qjax import ops as ops
from qjax.allocate import Allocation as Allocation
from qjax.allocate import allocate as allocate
from qjax.checkpoint import load as load
from qjax.checkpoint import save as save
from qjax.convert import convert as convert
from qjax.errors import FormatError as FormatError
from qjax.errors import IntegrityError as IntegrityError
from qjax.errors import MissingExtraError as MissingExtraError
from qjax.errors import NonFiniteError as NonFiniteError
from qjax.errors import QjaxError as QjaxError
from qjax.errors import SpecError as SpecError
from qjax.errors import UnsupportedError as UnsupportedError
from qjax.formats import FP4 as FP4
from qjax.formats import FP8 as FP8
from qjax.formats import MXFP4 as MXFP4
from qjax.formats import MXFP8 as MXFP8
from qjax.formats import NF4 as NF4
from qjax.formats import NVFP4 as NVFP4
from qjax.formats import Cast as Cast
from qjax.formats import Format as Format
from qjax.formats import Ggml as Ggml
from qjax.formats import Int as Int
from qjax.generate import Generation as Generation
from qjax.generate import generate as generate
from qjax.generate import generate_detailed as generate_detailed
from qjax.inspection import inspect as inspect
from qjax.methods import HQQ as HQQ
from qjax.methods import RTN as RTN
from qjax.methods import Method as Method
from qjax.methods import Statistics as Statistics
from qjax.models import Decoder as Decoder
from qjax.ops import embed as embed
from qjax.ops import matmul as matmul
from qjax.ops import prepack as prepack
from qjax.quantize import QuantizationReport as QuantizationReport
from qjax.quantize import quantize as quantize
from qjax.quantize import quantize_checkpoint as quantize_checkpoint
from qjax.quantize import quantize_model as quantize_model
from qjax.recipes import PRESETS as PRESETS
from qjax.recipes import Recipe as Recipe
from qjax.recipes import Rule as Rule
from qjax.tensor import QuantizedTensor as QuantizedTensor
from qjax.tensor import dequantize as dequantize
from qjax.tree import ModelSize as ModelSize
from qjax.tree import dequantize_tree as dequantize_tree
from qjax.tree import model_size as model_size
from qjax.tree import param_count as param_count
from qjax.tree import quantize_tree as quantize_tree


def __getattr__(name: str) -> object:
    """Imports `qjax.train` when it is first used; it needs optax and more."""
    if name == "train":
        import importlib

        return importlib.import_module("qjax.train")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

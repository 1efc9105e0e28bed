"""What codes mean: one number format per file, pure encode and decode on arrays."""

from qjax.formats.additive import Additive as Additive
from qjax.formats.affine import Int as Int
from qjax.formats.base import Format as Format
from qjax.formats.base import format_from_dict as format_from_dict
from qjax.formats.codebook import FP4 as FP4
from qjax.formats.codebook import NF4 as NF4
from qjax.formats.codebook import Dynamic8 as Dynamic8
from qjax.formats.ggml import Ggml as Ggml
from qjax.formats.grouping import Grouping as Grouping
from qjax.formats.kmeans import KMeans as KMeans
from qjax.formats.minifloat import FP8 as FP8
from qjax.formats.minifloat import MXFP4 as MXFP4
from qjax.formats.minifloat import MXFP8 as MXFP8
from qjax.formats.minifloat import NVFP4 as NVFP4
from qjax.formats.minifloat import Cast as Cast
from qjax.formats.trellis import Trellis as Trellis

"""Pieces of Hopper kernels (Mosaic GPU), shared by the operations.

* `codes`: the order of packed codes at rest;
* `decode` and `operand`: their values, in registers that feed the tensor cores;
* `launch`: warpgroups that copy and compute, a ring of stages, tiles of memory;
* `schedule`: how blocks of threads share a product.
"""

from .codes import BLOCK as BLOCK
from .codes import THREADS as THREADS
from .codes import Codec as Codec
from .codes import pack as pack
from .codes import unpack as unpack
from .decode import Decode as Decode
from .decode import holds as holds
from .launch import MEMORY_REGISTERS as MEMORY_REGISTERS
from .launch import Ring as Ring
from .launch import barriers as barriers
from .launch import kernel as kernel
from .launch import out_tiles as out_tiles
from .launch import registers as registers
from .launch import roles as roles
from .launch import swizzle as swizzle
from .launch import tile as tile
from .launch import transpose as transpose
from .launch import write_turned as write_turned
from .operand import ROWS as ROWS
from .operand import constant as constant
from .operand import fill_table as fill_table
from .operand import fragment as fragment
from .operand import load_row as load_row
from .operand import load_words as load_words
from .operand import magic_word as magic_word
from .operand import table_pairs as table_pairs
from .schedule import Schedule as Schedule

"""Models: one configurable decoder, its configurations and its weight names."""

from qjax.models.block import Block
from qjax.models.cache import KVCache, LayerCache, Positions, positions_from_mask
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.models.matching import Match, from_hf, match, read_parts, to_hf
from qjax.models.weights import Entry, param_shapes, plan

__all__ = [
    "Block",
    "Decoder",
    "Entry",
    "KVCache",
    "LayerCache",
    "Match",
    "ModelConfig",
    "Positions",
    "from_hf",
    "match",
    "param_shapes",
    "plan",
    "positions_from_mask",
    "read_parts",
    "to_hf",
]

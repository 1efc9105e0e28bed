"""The whole catalogue."""

import hostile_adapter
import hostile_artifact
import hostile_floats
import hostile_gguf
import hostile_gguf_tensors
import hostile_integers
import hostile_json
import hostile_packed
import hostile_pickle
import hostile_readers
import hostile_safetensors
import hostile_sides
import hostile_vectors
import hostile_vptq
from hostile_case import Case

CASES: list[Case] = [
    *hostile_safetensors.CASES,
    *hostile_json.CASES,
    *hostile_pickle.CASES,
    *hostile_packed.CASES,
    *hostile_readers.CASES,
    *hostile_integers.CASES,
    *hostile_floats.CASES,
    *hostile_vectors.CASES,
    *hostile_vptq.CASES,
    *hostile_sides.CASES,
    *hostile_adapter.CASES,
    *hostile_artifact.CASES,
    *hostile_gguf.CASES,
    *hostile_gguf_tensors.CASES,
]

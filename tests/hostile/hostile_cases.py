"""The whole catalogue."""

import hostile_adapter
import hostile_artifact
import hostile_json
import hostile_packed
import hostile_pickle
import hostile_safetensors
from hostile_case import Case

CASES: list[Case] = [
    *hostile_safetensors.CASES,
    *hostile_json.CASES,
    *hostile_pickle.CASES,
    *hostile_packed.CASES,
    *hostile_adapter.CASES,
    *hostile_artifact.CASES,
]

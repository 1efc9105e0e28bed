"""The whole catalogue."""

import hostile_json
import hostile_pickle
import hostile_safetensors
from hostile_case import Case

CASES: list[Case] = [
    *hostile_safetensors.CASES,
    *hostile_json.CASES,
    *hostile_pickle.CASES,
]

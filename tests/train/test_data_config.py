"""Settings of training data: what is refused, and JSON."""

import dataclasses
import json

import pytest

from qjax.errors import SpecError
from qjax.train.data_config import Data


def test_json_round_trip():
    """Several paths come back from JSON as they went."""
    data = Data(("a", "b*"), eval_path="c", seed=3)
    assert Data(**json.loads(json.dumps(dataclasses.asdict(data)))) == data


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "csv"}, "kind is 'csv', expected one of"),
        ({"too_long": "cut"}, "too_long is 'cut', expected one of"),
        ({"context": 0}, "context is 0, expected a whole number of at least 1"),
        ({"context": 1.5}, "context is 1.5, expected a whole"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"workers": True}, "workers is True"),
        ({"eval_fraction": 1.0}, "eval_fraction is 1.0"),
        ({"eval_fraction": "a"}, "eval_fraction is 'a'"),
        ({"eval_fraction": 0.1, "eval_path": "b"}, "not both"),
        ({"path": 3}, "path is 3, expected"),
        ({"eval_path": ["a", None]}, r"eval_path is \('a', None\), expected"),
        ({"template": 3}, "template is 3, expected"),
        ({"field": ""}, "field is '', expected"),
        ({"pack": "yes"}, "pack is 'yes', expected"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(SpecError, match=f"^data: .*{message}"):
        Data(**{"path": "a", **settings})

"""Every hostile input raises its documented error, quickly, and escapes nowhere."""

from typing import Any

import pytest
from hostile_cases import CASES as ALL
from hostile_layers import BASES

from qjax.converters.packed import READERS

CASES = {case.name: case for case in ALL}


def test_names_are_unique() -> None:
    assert len(CASES) == len(ALL)


def test_every_reader_has_a_valid_layer() -> None:
    kinds = {config.get("quant_method", "mlx") for config, _ in BASES.values()}
    assert kinds == set(READERS)
    for base in BASES:
        assert CASES[f"packed-{base}-ok"].error is None, base


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, outcomes: dict[str, Any]) -> None:
    case, attempts = CASES[name], outcomes[name]
    assert attempts
    for attempt in attempts:
        assert attempt["error"] == case.error, attempt
        assert case.message in attempt["message"], attempt
        assert attempt["message"].isprintable(), attempt
        assert len(attempt["message"]) < 1500, attempt
        assert attempt["ours"] == (case.error is not None), attempt
        assert not attempt["escaped"], attempt
        assert attempt["seconds"] < 2, attempt
        assert attempt["memory"] < 256 << 20, attempt

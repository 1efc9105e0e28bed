"""Runs the whole catalogue of hostile inputs once, in one confined child process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Case id to what happened in the child."""
    folder = tmp_path_factory.mktemp("hostile")
    report = folder / "report.json"
    child = subprocess.run(
        [sys.executable, "-W", "error", str(HERE / "hostile_child.py"), folder, report],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"},  # no case opens files
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return json.loads(report.read_text())

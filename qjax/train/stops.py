"""Stopping a run when the system asks: the step ends, its state is saved, then it ends.

Decides that the first SIGINT or SIGTERM is a request, and that a second one acts as if
nobody had listened. Processes of one run agree on the step before any of them stops.
"""

import signal
import threading
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stops:
    """Listens while it is entered; elsewhere than in the main thread it cannot.

    Attributes:
      received: Name of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stops":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in _SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def wanted(self) -> bool:
        """Whether to stop after this step; every process of a run must ask."""
        if jax.process_count() == 1:
            return self.received is not None
        heard = np.asarray(self.received is not None)
        return bool(np.any(multihost_utils.process_allgather(heard)))

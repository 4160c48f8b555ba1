"""How does a run end where a user or a scheduler stops it?"""

from __future__ import annotations

import signal
from types import FrameType


class Interruption:
    """Turns Ctrl-C and SIGTERM into a flag, so that the step at hand is finished and saved.

    Attributes:
        requested: whether such a signal has come.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before = {
            number: signal.signal(number, self._request)
            for number in (signal.SIGINT, signal.SIGTERM)
        }

    def restore(self) -> None:
        """Let signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

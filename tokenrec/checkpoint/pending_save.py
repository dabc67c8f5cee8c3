"""Follow a save to its end in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class PendingSave(threading.Thread):
    """Wait for a save of Orbax, then complete it; the thread runs from the start.

    Args:
      step: step of the checkpoint.
      response: what Orbax returned when the save began, or the error it raised; None if
        only the completion is left to do.
      complete: called when Orbax has given the folder its final name.

    Attributes:
      step: as given.
      error: what ended the save; None if it is complete, or not at its end yet.
    """

    def __init__(self, step: int, response: Any, complete: Callable[[], None]) -> None:
        super().__init__(name=f"save of checkpoint {step}", daemon=True)
        self.step = step
        self.error: BaseException | None = None
        self._response = response
        self._complete = complete
        self.start()

    def run(self) -> None:
        """Wait and complete; an error is kept for the thread that waits."""
        try:
            if isinstance(self._response, BaseException):
                raise self._response
            if self._response is not None:
                self._response.result()
            self._complete()
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
            self.error = error

"""Keep what libraries log about errors that a user is told anyway out of stderr."""

from __future__ import annotations

import logging
import sys
import warnings

from absl import logging as absl_logging

# Orbax logs the traceback of an error in each of the threads that it passes, and then
# raises it: a thousand lines for one full disk.
_RAISED_AGAIN = (
    "orbax/checkpoint/_src/futures/future.py",
    "orbax/checkpoint/_src/checkpointers/async_checkpointer.py",
    "orbax/checkpoint/checkpoint_manager.py",
)

# TensorStore says so, in threads of its own, of each write that was under way when Orbax gave
# up.
_GIVEN_UP = "Event loop is closed"


def shorten() -> None:
    """Log errors of Orbax without tracebacks, and not those that it raises as well.

    For a process of the command line: it replaces a hook of Python.
    """
    # Orbax logs through absl.
    absl_logging.get_absl_logger().addFilter(_shorten_record)
    sys.unraisablehook = _print_unraisable
    # What Orbax had still to do when a save failed.
    warnings.filterwarnings(
        "ignore", "coroutine .* was never awaited", category=RuntimeWarning
    )


def _print_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    if str(unraisable.exc_value) != _GIVEN_UP:
        sys.__unraisablehook__(unraisable)


def _shorten_record(record: logging.LogRecord) -> bool:
    if not record.exc_info or "orbax/" not in record.pathname:
        return True
    if record.pathname.endswith(_RAISED_AGAIN):
        return False
    record.exc_info = None
    record.exc_text = None
    record.msg, record.args = record.getMessage().partition("\n")[0], None
    return True

"""Keep what libraries log about errors that a user is told anyway out of stderr."""

from __future__ import annotations

import logging

# Orbax logs the traceback of an error in each of the threads that it passes, and then
# raises it: a thousand lines for one full disk.
_RAISED_AGAIN = (
    "orbax/checkpoint/_src/futures/future.py",
    "orbax/checkpoint/_src/checkpointers/async_checkpointer.py",
    "orbax/checkpoint/checkpoint_manager.py",
)


def shorten() -> None:
    """Log errors of Orbax without tracebacks, and not those that it raises as well."""
    # Orbax logs through absl. Adding the same filter again does nothing.
    logging.getLogger("absl").addFilter(_shorten_record)


def _shorten_record(record: logging.LogRecord) -> bool:
    if not record.exc_info or "orbax/" not in record.pathname:
        return True
    if record.pathname.endswith(_RAISED_AGAIN):
        return False
    record.exc_info = None
    record.exc_text = None
    record.msg, record.args = record.getMessage().partition("\n")[0], None
    return True

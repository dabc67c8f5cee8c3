"""Make calls of a process fail or wait, as `chaos.py` asks.

Python imports this module at its start if its folder is on `PYTHONPATH`. The environment
variable `CHAOS_FAULT` is a JSON object:

- `event`: "read" or "write" (a file is opened), "list", "rename", "make", "remove",
  "stat", "fsync", "hash" (of a file) or "import".
- `match`: a regular expression for the path, or for the name of the module.
- `skip`: matching events that pass unharmed first.
- `times`: events that are disturbed after these; -1 for all.
- `errno`: number of the error that they raise; 0 for none.
- `hold`: seconds that they wait, until the file `release` exists.
- `report`: file that gets a line for each disturbed event.
"""

import hashlib
import json
import os
import re
import sys
import threading
import time

# Events of `sys.addaudithook`; an error that the hook raises is raised by the call.
_AUDITED = {
    "os.listdir": "list",
    "os.scandir": "list",
    "os.rename": "rename",
    "os.mkdir": "make",
    "os.remove": "remove",
    "os.rmdir": "remove",
    "import": "import",
}


class _Fault:
    """The fault of this process."""

    def __init__(self, fault):
        self._event = fault["event"]
        self._match = re.compile(fault["match"])
        self._skip = fault["skip"]
        self._left = fault["times"]
        self._errno = fault["errno"]
        self._hold = fault["hold"]
        self._release = fault["release"]
        self._report = fault["report"]
        self._lock = threading.Lock()
        # What the fault itself does is not disturbed.
        self._inside = threading.local()

    def audit(self, event, arguments):
        if event == "open":
            path, mode, flags = arguments
            writes = set(mode or "") & set("wax+") if mode else flags & 3
            self.meet("write" if writes else "read", path)
        elif event in _AUDITED and arguments:
            self.meet(_AUDITED[event], arguments[0])

    def meet(self, event, path):
        """Disturb the event if it is one of the fault."""
        if event != self._event or getattr(self._inside, "busy", False):
            return
        self._inside.busy = True
        try:
            if isinstance(path, int):
                path = os.readlink(f"/proc/self/fd/{path}")
            path = os.fsdecode(path)
            if self._match.search(path) and self._is_due():
                self._disturb(path)
        finally:
            self._inside.busy = False

    def _is_due(self):
        with self._lock:
            if self._skip:
                self._skip -= 1
                return False
            if not self._left:
                return False
            self._left -= 1
            return True

    def _disturb(self, path):
        with open(self._report, "a") as report:
            report.write(f"{self._event} {path}\n")
        deadline = time.monotonic() + self._hold
        while time.monotonic() < deadline and not os.path.exists(self._release):
            time.sleep(0.01)
        if self._errno:
            raise OSError(self._errno, os.strerror(self._errno), path)


def _before(fault, event, path_of, call):
    """Return `call` with the fault before it."""

    def disturbed(*arguments, **named):
        fault.meet(event, path_of(*arguments))
        return call(*arguments, **named)

    return disturbed


def _install(fault):
    sys.addaudithook(fault.audit)
    # These calls have no audit event.
    os.stat = _before(fault, "stat", lambda path, *_: path, os.stat)
    os.fsync = _before(fault, "fsync", lambda file: file, os.fsync)
    hashlib.file_digest = _before(
        fault, "hash", lambda file, *_: file.name, hashlib.file_digest
    )


if "CHAOS_FAULT" in os.environ:
    _install(_Fault(json.loads(os.environ["CHAOS_FAULT"])))

"""Write values into shell scripts."""

from __future__ import annotations

import shlex


def assignment(name: str, value: str | list[str]) -> str:
    """Assign a text or an array to a variable of bash.

    The value is quoted, so that none can be read as shell code.

    >>> assignment("NAME", "it's"), assignment("FLAGS", ["--a", "b c"])
    ('NAME=\\'it\\'"\\'"\\'s\\'', "FLAGS=(--a 'b c')")
    """
    quoted = shlex.quote(value) if isinstance(value, str) else f"({shlex.join(value)})"
    return f"{name}={quoted}"

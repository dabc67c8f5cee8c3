"""Source lines of the instructions of a compiled program, from its text.

An instruction names a stack frame, and tables at the head of the text hold the frames:

    FileNames
    2 "/home/me/tokenrec/models/backbones/block.py"
    FileLocations
    7 {file_name_id=2 function_name_id=3 line=60 end_line=60 column=8 end_column=40}
    StackFrames
    9 {file_location_id=7 parent_frame_id=6}
    ...
      %f = f32[8]{0} fusion(%p), metadata={op_name="jit(f)/mul" stack_frame_id=9}

The number of the calling frame is one less than `parent_frame_id`.
"""

from __future__ import annotations

import re
from pathlib import Path

# The folder of this package, as frames name it.
_PACKAGE = f"{Path(__file__).parents[1]}/"
_SECTION = re.compile(r"^(FileNames|FunctionNames|FileLocations|StackFrames)\s*$")
_ROW = re.compile(r"^(\d+) (.*)$")
_FRAME = re.compile(r"stack_frame_id=(\d+)")


class SourceLines:
    """Lookup of the source line that made an instruction."""

    def __init__(self, hlo: str) -> None:
        """Read the tables of a program's text; a text without them has no lines."""
        self._names: dict[int, str] = {}
        self._places: dict[int, tuple[int, int]] = {}
        self._frames: dict[int, tuple[int, int]] = {}
        section = ""
        for line in hlo.splitlines():
            if header := _SECTION.match(line):
                section = header[1]
            elif row := _ROW.match(line):
                self._read(section, int(row[1]), row[2])
            elif line.startswith(("%", "ENTRY")):
                break

    def _read(self, section: str, number: int, text: str) -> None:
        values = [int(value) for value in re.findall(r"=(\d+)", text)]
        if section == "FileNames":
            self._names[number] = text.strip('"')
        elif section == "FileLocations":
            self._places[number] = (values[0], values[2])
        elif section == "StackFrames":
            self._frames[number] = (values[0], values[1] - 1)

    def __call__(self, rest: str) -> str:
        """Find the innermost line of this package, as "tokenrec/step.py:41".

        Args:
          rest: text of an instruction after its opening parenthesis.

        Returns:
          The line; "" for an instruction that no line of the package made.
        """
        frame = _FRAME.search(rest)
        number = int(frame[1]) if frame else 0
        while number in self._frames:
            place, number = self._frames[number]
            name_number, line = self._places.get(place, (0, 0))
            name = self._names.get(name_number, "")
            if name.startswith(_PACKAGE):
                return f"tokenrec/{name.removeprefix(_PACKAGE)}:{line}"
        return ""

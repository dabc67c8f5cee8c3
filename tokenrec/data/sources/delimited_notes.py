"""What `delimited.py` changes or finds odd while it reads: said once, and counted."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

# What is said of a column. A key, with the name that is read from the column, names the
# count in the metadata of the data set.
_SENTENCES = {
    "whole_floats": "{count} values such as {example!r} were read as integers",
    "ids_like_floats": "{count} values such as {example!r} are whole numbers with a "
    "decimal point; as text they differ from the same numbers without one; declare "
    "int64 under key_types, or write integers everywhere",
    "padded": "{count} values such as {example!r} begin or end with a space, which "
    "stays part of them; remove it unless it is meant",
    "missing_words": "{count} values such as {example!r} are read as that word, and "
    "not as missing; leave the field empty where it is unknown",
    "cleaned_lists": "{count} lists such as {example!r} have empty parts or spaces "
    "around parts, which were left out",
    "hashed_requests": "{count} values such as {example!r} are no whole numbers; each "
    "text became a number of 63 bits, by a hash",
    "ambiguous_times": "{count} times such as {example!r} occur twice or never in "
    "their zone, because clocks were changed; the earlier time was taken",
}
# What may separate values instead of the declared separator.
SEPARATORS = {
    "|": "a bar",
    ";": "a semicolon",
    ",": "a comma",
    "^": "a caret",
    "/": "a slash",
    "\t": "a tab",
    " ": "a space",
}


@dataclasses.dataclass
class _Tally:
    """Numbers of lists in text, and of those that hold a possible separator."""

    path: Path
    column: str
    separator: str
    values: int = 0
    held: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)


class Notes:
    """Notes on the columns of one table, over all of its files.

    Args:
      said: lines that were said before; lines that are said are added.

    Attributes:
      counts: count of each kind of note, by kind and name.
    """

    def __init__(self, said: set[str]) -> None:
        self.counts: dict[str, int] = {}
        self._said = said
        # (kind, name) to the file, the column and the first example.
        self._first: dict[tuple[str, str], tuple[Path, str, object]] = {}
        self._files: dict[str, Path] = {}
        self._tallies: dict[str, _Tally] = {}

    def column(self, path: Path, column: str, name: str) -> ColumnNotes:
        """Return the notes of one column, from which `name` is read."""
        return ColumnNotes(self, path, column, name)

    def add(
        self, path: Path, column: str, name: str, kind: str, count: int, example: object
    ) -> None:
        """Add to a note; `kind` is a key of `_SENTENCES`."""
        key = f"{kind}_{name}"
        self.counts[key] = self.counts.get(key, 0) + count
        self._first.setdefault((kind, name), (path, column, example))

    def add_file(self, path: Path, note: str) -> None:
        """Add a note on a file; it is said of the first such file only."""
        self._files.setdefault(note, path)

    def tally(
        self,
        path: Path,
        column: str,
        name: str,
        separator: str,
        values: int,
        held: Mapping[str, tuple[int, str]],
    ) -> None:
        """Add to the counts of separators, as `ColumnNotes.tally`."""
        tally = self._tallies.setdefault(name, _Tally(path, column, separator))
        tally.values += values
        for other, (count, example) in held.items():
            tally.held[other] = tally.held.get(other, 0) + count
            if count:
                tally.examples.setdefault(other, example)

    def lines(self) -> Iterator[str]:
        """Yield the notes, a line each."""
        for note, path in self._files.items():
            yield f"{path}: {note}"
        for (kind, name), (path, column, example) in self._first.items():
            sentence = _SENTENCES[kind].format(
                count=self.counts[f"{kind}_{name}"], example=example
            )
            yield f"{path}: column '{column}': {sentence}"
        for name, tally in self._tallies.items():
            yield from _separator_line(name, tally)

    def say(self) -> None:
        """Print the lines that were not said before to stderr."""
        for line in self.lines():
            if line not in self._said:
                self._said.add(line)
                print(f"tokenrec: {line}", file=sys.stderr)


def _separator_line(name: str, tally: _Tally) -> Iterator[str]:
    """Yield a line where another separator is in most values, and the declared in none."""
    if tally.held.get(tally.separator):
        return
    other = max(SEPARATORS, key=lambda other: tally.held.get(other, 0))
    count = tally.held.get(other, 0)
    if 2 * count > tally.values:
        yield (
            f"{tally.path}: column '{tally.column}': every value is a single part, but "
            f"{count} of {tally.values}, such as {tally.examples[other]!r}, hold "
            f"{SEPARATORS[other]}; if it separates them, say so in the schema: "
            f'"separators": {{"{name}": "{other}"}}'
        )


@dataclasses.dataclass(frozen=True)
class ColumnNotes:
    """Notes on one column of one file.

    Attributes:
      notes: those of the table.
      path: the file.
      column: the column.
      name: key, label or feature that is read from it.
    """

    notes: Notes
    path: Path
    column: str
    name: str

    def add(self, kind: str, count: int, example: object) -> None:
        """Add to a note.

        Args:
          kind: kind of the note.
          count: number of values.
          example: one of them.
        """
        self.notes.add(self.path, self.column, self.name, kind, count, example)

    def tally(
        self, separator: str, values: int, held: Mapping[str, tuple[int, str]]
    ) -> None:
        """Count the separators in lists of text.

        Args:
          separator: the declared one.
          values: number of lists.
          held: possible separator to the number of lists that hold it, and one of them.
        """
        self.notes.tally(self.path, self.column, self.name, separator, values, held)

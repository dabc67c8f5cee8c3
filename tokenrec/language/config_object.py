"""An object of a `config.json`, whose values are read with checks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from tokenrec.errors import InputError


class ConfigObject:
    """A JSON object; errors name the file, the key and its value.

    A key of value null counts as there, and has the value None.

    Attributes:
      values: key -> value.
      where: the file, and the object within it, for messages.
    """

    def __init__(self, values: Any, where: str) -> None:
        """Check that `values` is an object.

        Args:
          values: the parsed JSON.
          where: the file, and the object within it, for messages.

        Raises:
          InputError: it is no object.
        """
        if not isinstance(values, dict):
            raise InputError(f"{where} is no JSON object; give a config.json")
        self.values: Mapping[str, Any] = values
        self.where = where

    def with_defaults(self, defaults: Mapping[str, Any]) -> ConfigObject:
        """A copy, with `defaults` for the keys that it lacks."""
        return ConfigObject({**defaults, **self.values}, self.where)

    def updated(self, other: ConfigObject) -> ConfigObject:
        """A copy, in which the values of `other` replace those of the same key."""
        return ConfigObject({**self.values, **other.values}, self.where)

    def get(self, key: str) -> Any:
        """Value of a key as it is; None without one."""
        return self.values.get(key)

    def shown(self, key: str) -> str:
        """Key and value, for messages."""
        return f"{key}={self.get(key)!r}"

    def error(self, key: str, reason: str) -> InputError:
        """The error that a value of this object is wrong."""
        return InputError(
            f"{self.where}: {self.shown(key)} {reason}; check the file, or copy it from "
            "its checkpoint again"
        )

    def object(self, key: str) -> ConfigObject | None:
        """Object of a key; None for null and without the key.

        Raises:
          InputError: the value is of another type.
        """
        value = self.get(key)
        return None if value is None else ConfigObject(value, f"{self.where}, '{key}'")

    def integer(self, key: str, at_least: int = 1, at_most: int = 10**9) -> int:
        """A whole number.

        Raises:
          InputError: it is none, too small or too large.
        """
        value = self.get(key)
        if type(value) is not int or not at_least <= value <= at_most:
            raise self.error(
                key, f"is not a whole number between {at_least} and {at_most}"
            )
        return value

    def optional_integer(self, key: str) -> int | None:
        """A whole number of at least 1; None for null and without the key."""
        return None if self.get(key) is None else self.integer(key)

    def number(self, key: str, above: float = 0.0) -> float:
        """A finite number.

        Raises:
          InputError: it is none, or not above the limit.
        """
        value = self.get(key)
        # No infinity, and no number of hundreds of digits.
        if type(value) not in (int, float) or not above < value <= sys.float_info.max:
            raise self.error(key, f"is not a number above {above:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false.

        Raises:
          InputError: it is neither.
        """
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.error(key, "is neither true nor false")
        return value

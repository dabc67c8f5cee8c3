"""Nested programs of a traced program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def inner_jaxprs(values: Iterable[Any]) -> Iterator[Jaxpr]:
    """Yield the programs among the parameters of an equation, also in tuples and lists.

    A scan has one, a `cond` one per branch, a matrix product none.
    """
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from inner_jaxprs(value)

"""User ids as integer codes, the groups of GAUC."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa

from tokenrec.errors import InputError


def group_codes(ids: np.ndarray) -> np.ndarray:
    """Convert user ids to integers that are the same in every batch and on every host.

    Integers are their own code. The code of a string is its 64-bit BLAKE2b digest:
    among a million users, any two share one with probability 3e-8, and would then count
    as one user.

    Args:
      ids: `[N]`, integers or strings.

    Returns:
      `[N] int64`.

    Raises:
      InputError: `ids` are neither integers nor strings.

    >>> group_codes(np.array([5, 3])).tolist()
    [5, 3]
    """
    array = arrow_ids(ids)
    if pa.types.is_integer(array.type):
        return array.to_numpy().astype(np.int64)
    # Each distinct string is hashed once.
    encoded = array.dictionary_encode()
    digests = [
        hashlib.blake2b(name.encode(), digest_size=8).digest()
        for name in encoded.dictionary.to_pylist()
    ]
    return np.frombuffer(b"".join(digests), "<i8")[encoded.indices.to_numpy()]


def arrow_ids(ids: np.ndarray) -> pa.Array:
    """Convert `ids: [N]`, integers or strings, to an Arrow array without nulls.

    Raises:
      InputError: `ids` are neither integers nor strings, or one is missing.
    """
    # Arrow decides the type of an object array, and refuses one of mixed types.
    try:
        array = pa.array(np.asarray(ids))
    except pa.ArrowException as error:
        raise InputError(
            f"groups cannot be read: {error}; give integers or strings"
        ) from error
    if array.null_count:
        raise InputError(
            f"groups hold {array.null_count} nulls; give each row its group"
        )
    if len(array) and not (
        pa.types.is_integer(array.type) or pa.types.is_string(array.type)
    ):
        raise InputError(f"groups are of type {array.type}; give integers or strings")
    return array

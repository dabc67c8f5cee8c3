"""Encode a request for scores: columns of raw values to the arrays of the programs.

User and history are encoded by `PrefixEncoder`, which says how values are read; this
module adds the candidates, each with its item and the context.

Letters: C candidates, I and D columns of `ids` and `dense` (schema.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tokenrec.data.schema import MISSING
from tokenrec.serving.artifact import Artifact
from tokenrec.serving.encoded import Encoded, Unknown
from tokenrec.serving.prefix_encoder import PrefixEncoder, digest_arrays
from tokenrec.serving.request import Request


class Encoder:
    """Encode requests for one artifact. Any number of threads may use it.

    Args:
      artifact: the artifact.
      allow_missing: features whose columns a request may leave out; they are read as
        null then.

    Raises:
      InputError: `allow_missing` names a feature that the model does not have, or a
        file of the artifact is damaged.
    """

    def __init__(self, artifact: Artifact, allow_missing: Sequence[str] = ()) -> None:
        self._query: bool = artifact.manifest["query"]
        self._prefix = PrefixEncoder(artifact, allow_missing)

    def encode(self, request: Request) -> Encoded:
        """Encode a request.

        Raises:
          BadRequest: a column is missing or unknown, or a value does not fit its
            feature.
        """
        encoder = self._prefix
        past = encoder.past(request)
        (ids, dense), items = encoder.states(
            request.candidates, request.context, "candidates", request.candidate_count
        )
        prefix = past.arrays
        if self._query:
            # The first candidate's context is that of the request.
            prefix["query_ids"] = np.where(encoder.context_ids, ids[:1], MISSING)
            prefix["query_dense"] = np.where(
                encoder.context_dense, dense[:1], np.float32(np.nan)
            )
        values, missing = past.unknown.values, past.unknown.missing
        encoder.state.count(ids, dense, values, missing)
        return Encoded(
            prefix=prefix,
            target_ids=ids,
            target_dense=dense,
            prefix_key=digest_arrays(prefix),
            events=len(past.items),
            unknown=Unknown(
                items=int((items < 0).sum()),
                history_items=past.unknown.history_items,
                rows=tuple(np.flatnonzero(items < 0).tolist()),
                values=values,
                missing=missing,
            ),
        )

    def blank(self) -> Encoded:
        """A request without user, history and context, and one unknown candidate."""
        encoder = self._prefix
        prefix = encoder.blank_past()
        if self._query:
            prefix["query_ids"], prefix["query_dense"] = encoder.state.blank(1)
        target_ids, target_dense = encoder.state.blank(1)
        return Encoded(
            prefix=prefix,
            target_ids=target_ids,
            target_dense=target_dense,
            prefix_key=digest_arrays(prefix),
            events=0,
            unknown=Unknown(1, 0, (0,), {}, {}),
        )

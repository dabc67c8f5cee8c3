"""Encode a request for items: columns of raw values to the arrays of the programs.

User and history are encoded by `PrefixEncoder`. This module adds the query, if the prompt
has one, the items of the events, and which items the answer may hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tokenrec.serving.artifact import Artifact
from tokenrec.serving.encoded import Arrays, EncodedRetrieval, Unknown
from tokenrec.serving.feature_values import FeatureGroup
from tokenrec.serving.item_filter import ItemFilter
from tokenrec.serving.prefix_encoder import PrefixEncoder, digest_arrays, right_align
from tokenrec.serving.request import BadRequest, Request
from tokenrec.serving.retrieval_request import DEFAULT_K, RetrievalRequest

_NO_ITEM = -1


class RetrievalEncoder:
    """Encode requests for items for one artifact. Any number of threads may use it.

    Args:
      artifact: an artifact of a retrieval run.
      allow_missing: features whose columns a request may leave out; they are read as
        null then.

    Raises:
      InputError: `allow_missing` names a feature that the model does not have, or a
        file of the artifact is damaged.
    """

    def __init__(self, artifact: Artifact, allow_missing: Sequence[str] = ()) -> None:
        manifest = artifact.manifest
        self._prefix = PrefixEncoder(artifact, allow_missing)
        self._filter = ItemFilter(artifact, self._prefix.catalogue)
        self._max_k: int = manifest["max_k"]
        self._items: int = manifest["items"]
        self._query: bool = manifest["query"]
        self._context = FeatureGroup(
            [f for f in artifact.schema.state if f.entity == "context"],
            self._prefix.tables,
        )

    def encode(self, request: RetrievalRequest) -> EncodedRetrieval:
        """Encode a request.

        Raises:
          BadRequest: a column is missing or unknown, a value does not fit its feature,
            `k` is too large, or a condition of the filter is wrong.
        """
        k = min(DEFAULT_K, self._max_k) if request.k is None else request.k
        if k > self._max_k:
            raise BadRequest(
                f"k: {k} is more than the {self._max_k} items that the artifact finds; "
                f"send at most {self._max_k}, or export with --max-k {k}"
            )
        past = self._prefix.past(request.request)
        prefix = past.arrays
        # Of an item that came after the training there is no vector.
        items = np.where(past.items < self._items, past.items, _NO_ITEM)
        prefix["items"] = right_align(
            np.maximum(items, _NO_ITEM).astype(np.int32), self._prefix.events, _NO_ITEM
        )
        if self._query:
            prefix |= self._encode_query(request.request, past.unknown)
        return EncodedRetrieval(
            prefix=prefix,
            prefix_key=digest_arrays(prefix),
            events=len(past.items),
            unknown=past.unknown,
            k=k,
            allowed=self._filter.allowed(request),
        )

    def blank(self) -> EncodedRetrieval:
        """A request without user, history and context."""
        prefix = self._prefix.blank_past()
        prefix["items"] = np.full(self._prefix.events, _NO_ITEM, np.int32)
        if self._query:
            prefix["query_ids"], prefix["query_dense"] = self._prefix.state.blank(1)
        unknown = Unknown(0, 0, (), {}, {})
        return EncodedRetrieval(prefix, digest_arrays(prefix), 0, unknown, 1, None)

    def _encode_query(self, request: Request, unknown: Unknown) -> Arrays:
        """The context of a request, in the columns of item and context."""
        given = {name: [value] for name, value in request.context.items()}
        ids, dense = self._prefix.columns(self._context, given, "context", 1)
        self._context.count(ids, dense, unknown.values, unknown.missing)
        query_ids, query_dense = self._prefix.state.blank(1)
        query_ids[:, self._prefix.context_ids] = ids
        query_dense[:, self._prefix.context_dense] = dense
        return {"query_ids": query_ids, "query_dense": query_dense}

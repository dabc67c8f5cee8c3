"""Item vectors from text: the mean of static token vectors over the words of an item.

The text of an item is its features of kind "text", as far as the data set keeps their
words, and the values of its categorical and multi-valued features that are strings. The
text of an item that only repeats these values is left out. Token vectors come from the package
wordllama (extra `text`), as files: no network is used, and no model is run.

A token that makes up the share p of all text weighs `a / (a + p)` with a = 0.001
(Arora, Liang and Ma 2017, algorithm 1). The vectors are centred and scaled to length 1.
The paper also removes the first principal component; that is left out, since it changes
hardly any neighbour here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tokenrec.data.dataset import Dataset
from tokenrec.data.schema import FIRST_KNOWN, MISSING, Feature, columns
from tokenrec.data.tokenizer import load_tokenizer
from tokenrec.data.vocabulary import load_vocabulary
from tokenrec.errors import InputError
from tokenrec.semantic_ids.vectors import ItemVectors, normalize

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# a: share of all tokens at which a token weighs a half.
TEXT_FREQUENCY = 1e-3
# Tokens whose vectors are in memory at a time: 1 GiB of float32 and float64 together.
_TOGETHER = 1 << 18

# Files in the package wordllama.
_TOKENIZER = "tokenizers/l2_supercat_tokenizer_config.json"
_WEIGHTS = "weights/l2_supercat_256.safetensors"


class TextFeature(NamedTuple):
    """The strings of an item feature.

    Attributes:
      name: of the feature.
      ids: `[N, length] int32`, of each item: `FIRST_KNOWN` + number of a value, less for
        none.
      values: `[V] object`, the strings.
    """

    name: str
    ids: np.ndarray
    values: np.ndarray


def text_features(
    dataset: Dataset, rows: np.ndarray | None = None, *, decodes: bool = True
) -> tuple[TextFeature, ...]:
    """List the catalogue features whose values are strings, but not item ids.

    Args:
      dataset: the prepared data set.
      rows: `[N] int64`, catalogue rows; None for all.
      decodes: list features of kind "text" too.
    """
    catalogue = dataset.catalogue
    features: list[TextFeature] = []
    written: list[tuple[Feature, np.ndarray]] = []
    place = columns(dataset.schema.group("catalogue"))
    chosen = catalogue.ids if rows is None else catalogue.ids[rows]
    item_ids = catalogue.item_id.astype(str)
    for feature in dataset.schema.group("catalogue"):
        is_written = feature.kind == "text" and decodes
        if not (is_written or feature.has_vocabulary):
            continue
        ids = np.asarray(chosen[:, slice(*place.ids[feature.name])])
        if is_written:
            written.append((feature, ids))
            continue
        vocabulary = load_vocabulary(dataset.directory, feature.table_name)
        is_text = vocabulary.dtype == object and len(vocabulary)
        # A feature that repeats the item ids says nothing about an item.
        if is_text and not np.isin(vocabulary.astype(str), item_ids).all():
            features.append(TextFeature(feature.name, ids, vocabulary))
    decoded = [_decoded(dataset, feature, ids) for feature, ids in written]
    texts = [_without_repeats(text, features) for text in decoded]
    return (*features, *(text for text in texts if (text.ids >= FIRST_KNOWN).any()))


def _decoded(dataset: Dataset, feature: Feature, ids: np.ndarray) -> TextFeature:
    """The distinct texts of a feature of kind "text", as the data set keeps them."""
    tokenizer = load_tokenizer(dataset.directory)
    distinct, number = np.unique(ids, axis=0, return_inverse=True)
    tokens = [
        [int(i) - FIRST_KNOWN for i in row if i >= FIRST_KNOWN] for row in distinct
    ]
    texts = tokenizer.decode_batch(tokens, skip_special_tokens=False)
    values = np.array([text.strip() for text in texts], object)
    known = (values != "")[number.ravel()]
    value = np.where(known, number.ravel() + FIRST_KNOWN, MISSING).astype(np.int32)
    return TextFeature(feature.name, value[:, None], values)


def _without_repeats(text: TextFeature, others: Sequence[TextFeature]) -> TextFeature:
    """Leave out the texts of items whose other features hold all of their words.

    A title may be made of the values of other features, which would then count twice.
    """
    rows = np.arange(len(text.ids))
    repeats = [
        all(word in held.lower() for word in words.lower().split())
        for words, held in zip(
            _joined([text], rows), _joined(others, rows), strict=True
        )
    ]
    ids = np.where(np.array(repeats, bool)[:, None], MISSING, text.ids)
    return text._replace(ids=ids)


def item_texts(dataset: Dataset, rows: np.ndarray) -> list[str]:
    """Join the strings of some items by " | ", in the order of `text_features`.

    Features of kind "text" are left out where the library that decodes them, of the extra
    `text`, is not installed.

    Args:
      dataset: the prepared data set.
      rows: `[n] int64`, catalogue rows.
    """
    decodes = importlib.util.find_spec("tokenizers") is not None
    features = text_features(dataset, rows, decodes=decodes)
    return _joined(features, np.arange(len(rows)))


def _joined(features: Sequence[TextFeature], rows: np.ndarray) -> list[str]:
    """Join the strings of some of the items by " | "."""
    texts: list[list[str]] = [[] for _ in rows]
    for feature in features:
        for words, ids in zip(texts, feature.ids[rows], strict=True):
            known = ids[ids >= FIRST_KNOWN]
            words.extend(feature.values[known - FIRST_KNOWN])
    return [" | ".join(words) for words in texts]


class _EncodedFeature(NamedTuple):
    """Values of a text feature as tokens. V values, n tokens over all values.

    Attributes:
      ids: `[N, length] int32`, ids of the values of each item.
      value: `[n] int64`, number of the value that each token belongs to.
      token: `[n] int64`.
      values: V, number of values.
    """

    ids: np.ndarray
    value: np.ndarray
    token: np.ndarray
    values: int


def text_vectors(dataset: Dataset) -> ItemVectors:
    """Compute the vectors of all items; an item without text has none.

    Raises:
      InputError: the catalogue holds no text, or the extra `text` is not installed.
    """
    features = text_features(dataset)
    if not features:
        raise InputError(
            f"vectors='text': no item feature of '{dataset.directory}' has strings as "
            "values; use --vectors cooccurrence, or prepare the data set with an item "
            "feature of kind text, or a categorical or multi-valued one of strings"
        )
    tokenizer, token_vectors = _load_wordllama()

    # 1. Encode the distinct values, and count the tokens over all items.
    encoded = []
    frequency = np.zeros(len(token_vectors))
    for feature in features:
        part = _encode(feature, tokenizer)
        uses = np.bincount(part.ids.ravel(), minlength=part.values + FIRST_KNOWN)
        uses = uses[FIRST_KNOWN:]
        frequency += np.bincount(
            part.token, weights=uses[part.value], minlength=len(frequency)
        )
        encoded.append(part)
    share = frequency / max(frequency.sum(), 1)
    token_weight = TEXT_FREQUENCY / (TEXT_FREQUENCY + share)

    # 2. Sum the weighted token vectors of each item.
    items = len(dataset.catalogue.item_id)
    total = np.zeros((items, token_vectors.shape[1]), np.float32)
    weight = np.zeros(items, np.float32)
    for part in encoded:
        _add_feature(total, weight, part, token_vectors, token_weight)

    # 3. Divide by the summed weights, and centre.
    known = weight > 0
    values = total[known] / weight[known, None]
    total[...] = 0
    total[known] = values - values.mean(axis=0)
    return normalize(total)


def _encode(feature: TextFeature, tokenizer: Tokenizer) -> _EncodedFeature:
    """Tokenize the values of a feature."""
    encodings = tokenizer.encode_batch(
        [value.lower() for value in feature.values], add_special_tokens=False
    )
    pieces = [encoding.ids for encoding in encodings]
    value = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    token = np.fromiter((t for piece in pieces for t in piece), np.int64, len(value))
    return _EncodedFeature(feature.ids, value, token, len(pieces))


def _add_feature(
    total: np.ndarray,
    weight: np.ndarray,
    part: _EncodedFeature,
    token_vectors: np.ndarray,
    token_weight: np.ndarray,
) -> None:
    """Add a feature's weighted token vectors and weights to those of the items.

    Args:
      total: `[N, D] float32`, changed in place.
      weight: `[N] float32`, changed in place.
      part: the feature.
      token_vectors: `[tokens, D] float32`.
      token_weight: `[tokens] float64`.
    """
    # A vector and a weight for each id of the feature; those of the reserved ids are 0.
    vector = np.zeros((part.values + FIRST_KNOWN, total.shape[1]), np.float32)
    token_id = part.value + FIRST_KNOWN
    for start in range(0, len(token_id), _TOGETHER):
        some = slice(start, start + _TOGETHER)
        tokens = part.token[some]
        weighted = token_vectors[tokens] * token_weight[tokens, None]
        np.add.at(vector, token_id[some], weighted)
    mass = np.bincount(
        token_id, weights=token_weight[part.token], minlength=len(vector)
    )
    for column in part.ids.T:
        total += vector[column]
        weight += mass[column]


def _load_wordllama() -> tuple[Tokenizer, np.ndarray]:
    """Load the tokenizer and the token vectors `[tokens, D] float32` of wordllama.

    Only the files of the package are read; it is not imported.

    Raises:
      InputError: the package is not installed.
    """
    package = importlib.util.find_spec("wordllama")
    if (
        package is None
        or not package.submodule_search_locations
        or importlib.util.find_spec("tokenizers") is None
    ):
        raise InputError(
            "vectors='text': the package wordllama, which holds the token vectors, is "
            'not installed; run `pip install ".[text]"` in a clone of tokenrec, or use '
            "--vectors cooccurrence"
        )
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    folder = Path(package.submodule_search_locations[0])
    tokenizer = Tokenizer.from_file(str(folder / _TOKENIZER))
    weights = load_file(folder / _WEIGHTS)["embedding.weight"]
    return tokenizer, weights.astype(np.float32)

"""Item vectors that semantic ids are made of: what items are bought together, and what their text says."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.data.dataset import Dataset
from tokenrec.data.interaction_log import EVENT
from tokenrec.data.schema import FIRST_KNOWN, Feature, columns
from tokenrec.data.vocabulary import load_vocabulary
from tokenrec.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VectorKind = Literal["cooccurrence", "text", "both"]

WINDOW = 5  # events between the two of a pair, at most
WIDTH = 128  # of a co-occurrence vector
REGULARIZER = 0.5  # of the co-occurrence graph, in mean degrees
SUBSPACE_ITERATIONS = 5
NEIGHBOURS = (
    10  # items whose co-occurrence vectors stand in for that of an item without one
)
LOAD_ROWS = 1 << 21
SPARSE_BLOCK = 1 << 14
TEXT_FREQUENCY = 1e-3  # share of all tokens at which a token's weight is a half

_TOKENIZER = "tokenizers/l2_supercat_tokenizer_config.json"
_WEIGHTS = "weights/l2_supercat_256.safetensors"


@dataclasses.dataclass(frozen=True)
class ItemVectors:
    """`values: [N, D] float32`, of length 1 or 0 in the order of the catalogue; `known: [N] bool`, length is 1."""

    values: np.ndarray
    known: np.ndarray


class TrainEvents(NamedTuple):
    """Events of the training split, each once, users one after another, in time order. All `[E]`."""

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray


class Pairs(NamedTuple):
    """A symmetric sparse matrix as both of its triangles, sorted by row. All `[P]`."""

    row: np.ndarray
    column: np.ndarray
    value: np.ndarray


def item_vectors(
    dataset: Dataset, events: TrainEvents, kind: VectorKind, seed: int
) -> ItemVectors:
    """Vectors of every item of the catalogue.

    With "both", an item without a co-occurrence vector takes the mean of those of the items nearest to it by text, so
    that its id lies among theirs; each half then has half of the squared length.

    Raises:
      InputError: no item gets a vector, or text is asked for and there is none (see `text_vectors`).
    """
    items = len(dataset.catalogue.item_id)
    if kind == "text":
        return text_vectors(dataset)
    text = text_vectors(dataset) if kind == "both" else None
    taken = cooccurrence_vectors(events, items, seed)
    if text is None:
        return taken
    filled = _fill_by_text(taken, text)
    return _normalized(np.concatenate([filled, text.values], axis=1))


def train_events(dataset: Dataset) -> TrainEvents:
    """Reads the events of the training split; the events that a continued chunk repeats are left out."""
    ends = np.cumsum(dataset.chunk_lengths("train"))
    parts: list[tuple[np.ndarray, ...]] = []
    user, last_id, last_time, start = -1, None, 0, 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        stop = max(
            start + 1, int(np.searchsorted(ends, before + LOAD_ROWS, side="right"))
        )
        log = dataset.load("train", start, stop)
        number, floor = (
            np.empty(log.num_chunks, np.int32),
            np.full(log.num_chunks, np.iinfo(np.int64).min),
        )
        for chunk, (first, end) in enumerate(
            zip(log.start[:-1], log.start[1:], strict=True)
        ):
            if last_id is None or log.user_id[chunk] != last_id:
                user, last_id = user + 1, log.user_id[chunk]
            else:
                floor[chunk] = (
                    last_time  # rows of one time are never split, so what is not later is a repeat
                )
            number[chunk], last_time = (
                user,
                int(log.time[end - 1]) if end > first else last_time,
            )
        chunk_of = np.repeat(np.arange(log.num_chunks), np.diff(log.start))
        kept = ((log.flags & EVENT) > 0) & (log.time > floor[chunk_of])
        parts.append((number[chunk_of[kept]], log.item[kept], log.time[kept]))
        start = stop
    user_number, item, time = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    return TrainEvents(user_number, item, time)


def cooccurrence_vectors(events: TrainEvents, items: int, seed: int) -> ItemVectors:
    """Spectral vectors of the graph of items that lie near each other in a user's history.

    They are `U S^(1/2)` of the largest eigenvalues of `normalized_counts`, scaled to length 1. An item that no other
    item is near has the vector zero. On Amazon Beauty these find the next item (docs/semantic_ids.md) better than
    positive pointwise mutual information does.

    Raises:
      InputError: no user has two different events in train.
    """
    counts = count_pairs(events, items, seed)
    if not len(counts.row):
        raise InputError(
            "vectors='cooccurrence': no two items of the training split lie near each other in a user's history; "
            "use --vectors text, or prepare a data set with longer histories"
        )
    graph = normalized_counts(counts, items)
    used, rows = np.unique(
        graph.row, return_inverse=True
    )  # the products below then cost nothing for other items
    inner = Pairs(rows, np.searchsorted(used, graph.column), graph.value)
    values = np.zeros((items, min(WIDTH, len(used))), np.float32)
    values[used] = _factorize(inner, len(used), values.shape[1], seed)
    return _normalized(values)


def count_pairs(events: TrainEvents, items: int, seed: int) -> Pairs:
    """Weighted counts of pairs of different items at most `WINDOW` events apart in a user's history.

    A pair d events apart counts 1 / d, and 1 where both have one time: such events have no order, and are shuffled so
    that the order in which they are stored does not decide which of them are near each other.
    """
    order = np.lexsort(
        (np.random.default_rng(seed).random(len(events.item)), events.time, events.user)
    )
    user, item, time = (
        events.user[order],
        events.item[order].astype(np.int64),
        events.time[order],
    )
    keys, weights = np.zeros(0, np.int64), np.zeros(0)
    for distance in range(1, min(WINDOW, max(len(item) - 1, 0)) + 1):
        one, other = item[:-distance], item[distance:]
        near = (user[:-distance] == user[distance:]) & (one != other)
        key = np.minimum(one, other)[near] * items + np.maximum(one, other)[near]
        weight = np.where(time[:-distance] == time[distance:], 1.0, 1 / distance)[near]
        keys, inverse = np.unique(np.concatenate([keys, key]), return_inverse=True)
        weights = np.bincount(
            inverse, weights=np.concatenate([weights, weight]), minlength=len(keys)
        )
    low, high = keys // items, keys % items
    row, column = np.concatenate([low, high]), np.concatenate([high, low])
    order = np.lexsort((column, row))
    return Pairs(row[order], column[order], np.concatenate([weights, weights])[order])


def normalized_counts(counts: Pairs, items: int) -> Pairs:
    """`n_ij / sqrt((n_i + t)(n_j + t))`, t half the mean of the degrees `n_i`: a regularised Laplacian.

    Without t the largest eigenvalues belong to small groups of rare items that nothing ties to the others (Qin and
    Rohe 2013, section 2).
    """
    degree = np.bincount(counts.row, weights=counts.value, minlength=items)
    root = np.sqrt(degree + REGULARIZER * degree[degree > 0].mean())
    return Pairs(
        counts.row,
        counts.column,
        (counts.value / (root[counts.row] * root[counts.column])).astype(np.float32),
    )


def text_features(dataset: Dataset) -> tuple[tuple[Feature, np.ndarray], ...]:
    """Catalogue features whose values are strings other than item ids, each with its vocabulary."""
    keys = dataset.catalogue.item_id.astype(str)
    found = []
    for feature in dataset.schema.group("catalogue"):
        if feature.kind in ("categorical", "multi_valued"):
            known = load_vocabulary(dataset.directory, feature.table_name)
            if (
                known.dtype == object
                and len(known)
                and not np.isin(known.astype(str), keys).all()
            ):
                found.append((feature, known))
    return tuple(found)


def item_texts(dataset: Dataset, rows: np.ndarray) -> list[str]:
    """Text of some items of the catalogue: the values of `text_features`, in their order, joined by " | "."""
    layout = columns(dataset.schema.group("catalogue"))
    features = text_features(dataset)
    texts = []
    for ids in dataset.catalogue.ids[rows]:
        words: list[str] = []
        for feature, known in features:
            words += [
                known[i - FIRST_KNOWN]
                for i in ids[slice(*layout.ids[feature.name])]
                if i >= FIRST_KNOWN
            ]
        texts.append(" | ".join(words))
    return texts


def text_vectors(dataset: Dataset) -> ItemVectors:
    """Weighted mean of wordllama's static token vectors over an item's text, centred.

    A token that makes up the share p of all text weighs `a / (a + p)`, a = `TEXT_FREQUENCY` (Arora, Liang and Ma 2017,
    algorithm 1). Their removal of the first component changes no neighbour to speak of here, so it is left out.

    Raises:
      InputError: the catalogue holds no text, or the extra `text` is not installed.
    """
    features = text_features(dataset)
    if not features:
        raise InputError(
            f"vectors='text': no item feature of '{dataset.directory}' has strings as values; "
            f"use --vectors cooccurrence, or prepare the data set with a categorical or multi-valued text feature"
        )
    tokens, token_vectors = _load_wordllama()
    layout = columns(dataset.schema.group("catalogue"))
    total = np.zeros(
        (len(dataset.catalogue.item_id), token_vectors.shape[1]), np.float32
    )
    weight = np.zeros(len(total), np.float32)
    encoded = []
    frequency = np.zeros(len(token_vectors))
    for feature, known in features:
        ids = np.asarray(dataset.catalogue.ids[:, slice(*layout.ids[feature.name])])
        pieces = [
            e.ids
            for e in tokens.encode_batch(
                [v.lower() for v in known], add_special_tokens=False
            )
        ]
        value = np.repeat(np.arange(len(known)), [len(p) for p in pieces])
        token = np.fromiter((t for p in pieces for t in p), np.int64, len(value))
        uses = np.bincount(ids.ravel(), minlength=len(known) + FIRST_KNOWN)[
            FIRST_KNOWN:
        ]
        frequency += np.bincount(token, weights=uses[value], minlength=len(frequency))
        encoded.append((ids, value, token, len(known)))
    token_weight = TEXT_FREQUENCY / (
        TEXT_FREQUENCY + frequency / max(frequency.sum(), 1)
    )
    for ids, value, token, count in encoded:
        vector = np.zeros((count + FIRST_KNOWN, total.shape[1]), np.float32)
        np.add.at(
            vector,
            value + FIRST_KNOWN,
            token_vectors[token] * token_weight[token, None],
        )
        mass = np.bincount(
            value + FIRST_KNOWN, weights=token_weight[token], minlength=len(vector)
        )
        for column in ids.T:
            total += vector[column]
            weight += mass[column]
    known_rows = weight > 0
    values = total[known_rows] / weight[known_rows, None]
    total[...] = 0
    total[known_rows] = values - values.mean(axis=0)
    return _normalized(total)


def _load_wordllama() -> tuple[Tokenizer, np.ndarray]:
    """Tokenizer, and token vectors `[tokens, width] float32`, from the files of the package, which is not imported."""
    found = importlib.util.find_spec("wordllama")
    if (
        found is None
        or not found.submodule_search_locations
        or importlib.util.find_spec("tokenizers") is None
    ):
        raise InputError(
            "vectors='text': the package wordllama, which holds the token vectors, is not installed; "
            "run `pip install 'tokenrec[text]'`, or use --vectors cooccurrence"
        )
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    folder = Path(found.submodule_search_locations[0])
    tokens = Tokenizer.from_file(str(folder / _TOKENIZER))
    return tokens, load_file(folder / _WEIGHTS)["embedding.weight"].astype(np.float32)


def _normalized(values: np.ndarray) -> ItemVectors:
    norm = np.linalg.norm(values, axis=1)
    known = norm > 1e-6
    scale = np.where(known, 1 / np.maximum(norm, 1e-6), 0)
    return ItemVectors((values * scale[:, None]).astype(np.float32), known)


def _fill_by_text(taken: ItemVectors, text: ItemVectors) -> np.ndarray:
    """Co-occurrence vectors, those that are missing taken from the neighbours by text: `[N, D]`."""
    warm, cold = (
        np.flatnonzero(taken.known & text.known),
        np.flatnonzero(~taken.known & text.known),
    )
    values = taken.values.copy()
    if len(warm) and len(cold):
        nearest = nearest_rows(text.values[cold], text.values[warm], NEIGHBOURS)
        values[cold] = _normalized(taken.values[warm][nearest].mean(axis=1)).values
    return values


def nearest_rows(queries: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Rows of `values: [N, D]` with the largest inner product with each of `queries: [Q, D]`: `[Q, count]`."""
    count = min(count, len(values))
    table = jnp.asarray(values)
    out = [
        np.asarray(_top(jnp.asarray(queries[s : s + 512]), table, count))
        for s in range(0, len(queries), 512)
    ]
    return np.concatenate(out) if out else np.zeros((0, count), np.int32)


@functools.partial(jax.jit, static_argnums=2)
def _top(queries: jax.Array, values: jax.Array, count: int) -> jax.Array:
    return jax.lax.top_k(queries @ values.T, count)[1]


def _factorize(matrix: Pairs, size: int, width: int, seed: int) -> np.ndarray:
    """`Q W |S|^(1/2)` of a symmetric sparse matrix, by subspace iteration (Halko et al. 2011, algorithm 4.4)."""
    blocks = -(-len(matrix.row) // SPARSE_BLOCK)
    padding = blocks * SPARSE_BLOCK - len(matrix.row)
    row = jnp.asarray(
        np.pad(matrix.row, (0, padding), constant_values=size)
        .reshape(blocks, -1)
        .astype(np.int32)
    )
    column = jnp.asarray(
        np.pad(matrix.column, (0, padding)).reshape(blocks, -1).astype(np.int32)
    )
    value = jnp.asarray(np.pad(matrix.value, (0, padding)).reshape(blocks, -1))
    rank = min(size, width + 10)
    basis = np.random.default_rng(seed).normal(size=(size, rank)).astype(np.float32)
    for _ in range(SUBSPACE_ITERATIONS):
        basis = np.linalg.qr(
            np.asarray(_product(row, column, value, jnp.asarray(basis)))
        )[0]
    image = np.asarray(_product(row, column, value, jnp.asarray(basis)))
    small = basis.T @ image
    values, rotation = np.linalg.eigh((small + small.T) / 2)
    top = np.argsort(-values)[:width]
    return basis @ rotation[:, top] * np.sqrt(np.maximum(values[top], 0))


@jax.jit
def _product(
    row: jax.Array, column: jax.Array, value: jax.Array, x: jax.Array
) -> jax.Array:
    def add(
        total: jax.Array, block: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        at, other, weight = block
        return total.at[at].add(
            x[other] * weight[:, None], mode="drop", indices_are_sorted=True
        ), None

    return jax.lax.scan(add, jnp.zeros_like(x), (row, column, value))[0]

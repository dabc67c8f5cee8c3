"""Alignment tasks: learn the texts of items by their semantic ids, and the reverse.

Each step draws items of the catalogue, and asks the language model about them with the
templates of `head.alignment` (`tokenrec/config/alignment.py`). With question q and answer
a_1 .. a_n of an item, words or codes, the loss of a sample is

    - sum_k log P(a_k | q, a_1 .. a_{k-1})

so that a word counts as much as a code of the next item. The stream is short, and apart
from that of the history:

    text  title title title .  text  ||  code code       answer: semantic id
    text  code code code       text  ||  title title     answer: title

Texts and codes of all items are a constant of the compiled program, as the ids of
`head.item_features` are: items are drawn inside the step, where no input pipeline
reaches.

Letters: B batch, N items with text and semantic id, W words, L levels, Q tokens of a
question, A of an answer, d model width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.config.alignment import FIELD, SID, AlignmentTask
from tokenrec.data.batch import Batch
from tokenrec.data.interaction_log import Catalogue
from tokenrec.data.schema import FIRST_KNOWN, MISSING, Schema, columns
from tokenrec.errors import InputError
from tokenrec.models.backbones.decoder import Decoder
from tokenrec.models.heads import SemanticIdHead
from tokenrec.models.recommender import Recommender
from tokenrec.models.stream_layout import title_features
from tokenrec.models.words import WordTable
from tokenrec.ops.layers import dropout, split_keys
from tokenrec.ops.tables.lookup import expand_rows
from tokenrec.sharding import RULES, reshard
from tokenrec.tokens.layout import Layout
from tokenrec.tokens.stream_segments import StreamSegment, make_layout

# Most bytes of texts and codes, which every device and every compiled program holds.
MOST_BYTES = 512 * 2**20
# Token ids of the texts before and behind the question of a task.
type QuestionTexts = tuple[tuple[int, ...], tuple[int, ...]]

# Separates the dropout keys of the tasks from those of the history stream.
_KEY = 0xA1


@dataclasses.dataclass(frozen=True, eq=False)
class Alignment:
    """The alignment tasks of a run, and the items that they are about.

    Attributes:
      tasks: templates and weights.
      literals: token ids of the texts before and behind the question of each task.
      titles: `[N, W] int32`, ids of the words of each item; `MISSING` fills up.
      codes: `[N, L] int32`, its semantic id.
    """

    tasks: tuple[AlignmentTask, ...]
    literals: tuple[QuestionTexts, ...]
    titles: np.ndarray
    codes: np.ndarray


def plan_alignment(
    tasks: tuple[AlignmentTask, ...],
    literals: tuple[QuestionTexts, ...],
    schema: Schema,
    catalogue: Catalogue | None,
) -> Alignment | None:
    """Choose the items that have both a text and a semantic id.

    Args:
      tasks: of `alignment_tasks`.
      literals: as `Alignment.literals`.
      schema: features that the model reads.
      catalogue: the items; None if the model is only described.

    Returns:
      None without tasks, or without a catalogue.

    Raises:
      InputError: the data set has no texts of items, no item has both, or texts and
        codes are more than `MOST_BYTES`.
    """
    if not tasks:
        return None
    features = title_features(schema)
    if not features:
        raise InputError(
            f"{FIELD} reads the texts of items, and the model reads no feature of kind "
            "'text' of them; prepare the data with one, or leave it out of data.exclude"
        )
    if catalogue is None:
        return None
    assert catalogue.codes is not None  # `validate` asks for data.semantic_ids.
    spans = columns(schema.group("catalogue")).ids
    known = catalogue.known
    titles = np.concatenate(
        [catalogue.ids[:known, slice(*spans[f.name])] for f in features], axis=1
    )
    codes = np.asarray(catalogue.codes[:known])
    has_both = (titles != MISSING).any(axis=1) & (codes >= 0).all(axis=1)
    if not has_both.any():
        raise InputError(
            f"{FIELD} ties texts to semantic ids, and none of the {len(titles):,} items "
            f"has both a {' or '.join(f.name for f in features)} and an id of "
            "data.semantic_ids; build the ids for this data set, or use {}"
        )
    size = 4 * (titles.size + codes.size)
    if size > MOST_BYTES:
        raise InputError(
            f"{FIELD}: texts and semantic ids of {len(titles):,} items are "
            f"{size / 2**20:,.0f} MiB of every compiled program, and at most "
            f"{MOST_BYTES / 2**20:.0f} are supported; shorten the texts of the data "
            "set, or use {}"
        )
    return Alignment(tasks, literals, _without_gaps(titles[has_both]), codes[has_both])


def _without_gaps(titles: np.ndarray) -> np.ndarray:
    """Move the words of each item to the front, and drop columns that no item needs."""
    order = np.argsort(titles == MISSING, axis=1, kind="stable")
    words = (titles != MISSING).sum(axis=1).max()
    return np.take_along_axis(titles, order, axis=1)[:, :words]


def draw_aligned(alignment: Alignment, key: jax.Array, samples: int) -> jax.Array:
    """Draw an item for each sample and task: `[B, tasks] int32`, its row of N."""
    shape = (samples, len(alignment.tasks))
    return jax.random.randint(
        key,
        shape,
        0,
        len(alignment.titles),
        jnp.int32,
        out_sharding=RULES("batch", None),
    )


def alignment_losses(
    alignment: Alignment,
    module: Recommender,
    batch: Batch,
    keys: jax.Array | None,
) -> jax.Array:
    """Weighted sum of the losses of the tasks, for each sample.

    Args:
      alignment: the tasks.
      module: the model with its weights.
      batch: the batch, with `aligned`.
      keys: `[B]`, PRNG keys of dropout; None in evaluation.

    Returns:
      `[B] float32`.
    """
    losses = losses_by_task(alignment, module, batch, keys)
    return sum(
        (t.weight * loss for t, loss in zip(alignment.tasks, losses, strict=True)),
        jnp.zeros(batch.valid.shape[0], out_sharding=RULES("batch")),
    )


def losses_by_task(
    alignment: Alignment,
    module: Recommender,
    batch: Batch,
    keys: jax.Array | None,
) -> list[jax.Array]:
    """Loss of each task, `[B] float32`, without its weight."""
    # JAX would compute with a constant while it compiles.
    tables = jax.lax.optimization_barrier(
        (jnp.asarray(alignment.titles), jnp.asarray(alignment.codes))
    )
    tables = reshard(tables, RULES(None, None))
    losses = []
    for number, task in enumerate(alignment.tasks):
        # A batch of 1 has lost its sharding in a slice.
        rows = reshard(batch.aligned[:, number], RULES("batch"))
        titles, codes = (expand_rows(table, rows) for table in tables)
        task_keys = None
        if keys is not None:
            fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
            task_keys = fold(keys, _KEY + number)
        answer = _codes_loss if task.answer == SID else _words_loss
        literals = alignment.literals[number]
        losses.append(answer(module, literals, titles, codes, batch, task_keys))
    return losses


def _codes_loss(
    module: Recommender,
    literals: QuestionTexts,
    titles: jax.Array,
    codes: jax.Array,
    batch: Batch,
    keys: jax.Array | None,
) -> jax.Array:
    """-log P(codes | titles), `[B]`, of `titles: [B, W]` and `codes: [B, L]`."""
    words, head = module.words, module.head
    assert isinstance(words, WordTable)
    assert isinstance(head, SemanticIdHead)
    before, between = (len(literal) for literal in literals)
    question = words(titles, module.dtype)
    # The last code is predicted, never read.
    answer = module.code_tokens(codes[:, :-1])
    present = jnp.pad(
        titles != MISSING,
        ((0, 0), (before, between + answer.shape[1])),
        constant_values=True,
    )
    h = _read_out(module, literals, question, answer, batch, keys, present)
    return head.losses(h, codes[:, None, None])


def _words_loss(
    module: Recommender,
    literals: QuestionTexts,
    titles: jax.Array,
    codes: jax.Array,
    batch: Batch,
    keys: jax.Array | None,
) -> jax.Array:
    """-log P(titles | codes), `[B]`, of `titles: [B, W]` and `codes: [B, L]`."""
    words = module.words
    assert isinstance(words, WordTable)
    # What fills a title up follows its words, which therefore do not see it.
    answer = words(titles[:, :-1], module.dtype)
    question = module.code_tokens(codes)
    h = _read_out(module, literals, question, answer, batch, keys, None)

    # The scores of all words are not kept for the backward pass.
    @jax.checkpoint
    def log_probs_of(h: jax.Array) -> jax.Array:
        logits = words.logits(h)
        # A comparison instead of a gather, whose gradient is a scatter.
        is_word = jnp.arange(logits.shape[-1]) == (titles - FIRST_KNOWN)[..., None]
        scores = jnp.sum(jnp.where(is_word, logits, 0), axis=-1)
        return scores - jax.nn.logsumexp(logits, axis=-1)

    log_probs = log_probs_of(h)
    return -jnp.sum(jnp.where(titles >= FIRST_KNOWN, log_probs, 0), axis=1)


def _read_out(
    module: Recommender,
    literals: QuestionTexts,
    question: jax.Array,
    answer: jax.Array,
    batch: Batch,
    keys: jax.Array | None,
    present: jax.Array | None,
) -> jax.Array:
    """Outputs that predict an answer.

    Args:
      module: the model.
      literals: token ids of the texts before and behind the question.
      question: `[B, Q, d]`, its tokens.
      answer: `[B, A, d]`, the tokens of the answer but for its last.
      batch: the batch, for its size.
      keys: `[B]`, PRNG keys of dropout.
      present: `[B, S] bool`, True for real tokens and False for padding; None: all are
        real.

    Returns:
      `[B, 1 + A, d]`: at the end of the question, and at each token of `answer`.
    """
    before, between = (module.literal_tokens(ids, batch) for ids in literals)
    token_keys, backbone_keys = split_keys(keys, 2)
    rate = module.config.model.dropout
    x = jnp.concatenate([before, question, between, answer], axis=1)
    x = dropout(x, rate, token_keys)
    lengths = [part.shape[1] for part in (before, question, between, answer)]
    layout = _layout(lengths, batch.valid.shape[1])
    assert isinstance(module.backbone, Decoder)
    return module.backbone(x, layout, batch.valid, None, backbone_keys, present=present)


def _layout(lengths: list[int], events: int) -> Layout:
    """Stream of a question, and of an answer behind it that is read out.

    Args:
      lengths: tokens of the text, the question, the text behind it, and the answer.
      events: T of the batch; none of them is in the stream.
    """
    before, question, between, answer = (
        StreamSegment.tokens("text", length, ordered=True) for length in lengths
    )
    return make_layout(
        [before, question, between],
        [answer],
        events=events,
        candidates=1 if lengths[-1] else 0,
        readout="last",
        marks_static=False,
    )

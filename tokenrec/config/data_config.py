"""Config section `data`: the prepared data set, and the samples cut from it."""

# ml_collections reads the annotations as types: they must not be postponed.

import dataclasses
from typing import Literal

from tokenrec.config.fields import BOUNDS, Bounds, field

Objective = Literal["ranking", "retrieval"]
Paradigm = Literal["nio", "uc"]
# Losses of tasks (tokenrec/task_plan.py says which kind has which).
LOSS_NAMES = ("huber", "squared", "weighted_logistic", "cross_entropy")


@dataclasses.dataclass
class DataConfig:
    """The prepared data set, and the samples cut from it."""

    name: str = ""
    """Name of the prepared data set: its folder under the environment variable
    `TOKENREC_DATA` (default `data/`). `path` takes precedence."""

    path: str = ""
    """Folder of the prepared data set. The flag `--data` sets it."""

    schema: str = ""
    """Planned schema, a JSON file (such as the `tokenrec.json` of a data set) or the name
    of one in `configs/schemas/`. `tokenrec compile` and `tokenrec describe` read table
    sizes from it as long as there is no prepared data set; training does not use it.
    Empty: the shipped one that is named like the data set, if there is one."""

    exclude: tuple[str, ...] = ()
    """Features that the model does not read."""

    semantic_ids: str = ""
    """Semantic ids of the items: the folder that `tokenrec semantic-ids` wrote, or its
    `semantic_ids.parquet`; a relative path may also lie under `TOKENREC_DATA`. They add
    the item feature `semantic_id`, and they are the codes that
    `head.retrieval='semantic_id'` predicts."""

    tasks: dict[str, float] = dataclasses.field(
        default_factory=dict, metadata={BOUNDS: Bounds(above=0)}
    )
    """Tasks that are trained and evaluated, each with the weight of its loss. Empty:
    every task of the data set, with the weight in its schema."""

    losses: dict[str, str] = dataclasses.field(
        default_factory=dict, metadata={BOUNDS: Bounds(choices=LOSS_NAMES)}
    )
    """Losses of tasks whose labels are numbers (kind `real`): `huber` (the default) or
    `squared`, of the standardised label; `weighted_logistic` for durations and other
    labels of 0 or more; `cross_entropy` for shares from 0 to 1. Other kinds have the
    cross-entropy. docs/methods.md, section 2, "Tasks"."""

    huber_delta: float = field(1.0, above=0)
    """Error beyond which `huber` grows linearly, in standard deviations of the
    label."""

    auxiliary: tuple[str, ...] = ()
    """Tasks that are trained but not evaluated: they enter no metric, and not the
    choice of the best checkpoint."""

    request_loss: Literal["none", "pairwise", "listwise"] = "none"
    """New impression only, ranking: a loss among the candidates of a sample, which
    share a request, beside the loss of each label. `pairwise` compares each pair of
    different labels (BPR), `listwise` is the cross-entropy of a softmax over the
    candidates. It needs `candidates` above 1."""

    request_weight: float = field(1.0, above=0)
    """Weight of `request_loss` beside the losses of the labels. It also has the weight
    of its task."""

    request_ndcg: int = field(0, at_least=1, special={0: "not computed"})
    """Ranking: evaluations also compute NDCG at this many places within requests of two
    rows or more, with the label as gain."""

    objective: Objective = "ranking"
    """`ranking` predicts the labels of an impression. `retrieval` predicts the next
    item among the whole catalogue; `head` configures how."""

    positive: str = ""
    """Retrieval only: task whose positive labels mark the items to retrieve. Empty:
    every scored log row is one."""

    paradigm: Paradigm = "nio"
    """`nio` (new impression only) builds a stream per request and predicts its
    candidates. `uc` (user-centric) builds a stream per run of a user's events and
    predicts at every event, which gives many more labels per stream; it needs a log
    whose events include negatives. See docs/methods.md, section 3."""

    events: int = field(50, at_least=1)
    """T, the most events in a sample; the newest ones are kept. More history costs time
    in proportion, and quadratically in layers without a window."""

    overlap: int = field(0, at_least=0)
    """User-centric only: events at the head of a continued stream that are history and
    carry no loss. A scored event has at least this much history, if its user has it.
    Higher is closer to `nio`, and each event is then computed more often."""

    unscored_weight: float = field(1.0, at_least=0)
    """User-centric ranking only: weight in the training loss of labelled events that
    are not scored, such as those of a history file that lacks the context of the log.
    Scored rows have weight 1. The loss of a step is the weighted mean; 0 leaves such
    events without loss. Evaluation reads scored rows only and does not change."""

    candidates: int = field(1, at_least=1)
    """C, the most candidates of a request that share a stream and its history; larger
    requests are split. 1 gives each impression its own stream. With
    `objective='retrieval'`: the most items to predict from one history."""

    buckets: tuple[int, ...] = ()
    """Stream lengths below `events`, in events. A batch is padded to the shortest
    length that holds it, so short histories cost less. Each length is compiled once
    more."""

    batch_size: int = field(256, at_least=1)
    """Samples of a training step, over all devices. A sample is a stream: in `uc` it
    carries many labels, so fewer samples make a batch of the same size."""

    eval_batch_size: int = field(512, at_least=1)
    """Samples of an evaluation step, over all devices. It does not change the metrics;
    lower it if evaluation runs out of memory."""

    window_rows: int = field(20_000_000, at_least=1)
    """Log rows that each process holds in memory and shuffles together. Lower it if the
    host runs out of memory; training then sees a less thoroughly shuffled epoch."""

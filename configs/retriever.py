"""Retriever for any prepared data set with events: which item will this user take next?

Command:
    tokenrec prepare SOURCE ... --out data/mine
    tokenrec train --config=retriever --data data/mine --workdir=runs/mine
    tokenrec evaluate --workdir=runs/mine --split=test --baselines
From a clone, `tokenrec train --config=configs/retriever.py` is the same.
Hardware: a few CPU cores up to millions of log rows, an accelerator beyond.
Time: MovieLens-100K about two minutes on 2 CPU cores.
Score: test Recall@10 0.1310, NDCG@10 0.0752 on MovieLens-100K as `tokenrec init` proposes
    it (four stars or more, `head.drop_seen`, 1 seed).
Source: docs/tutorial.md.

Every event predicts the next one. Of a data set with labels, only rows whose first label
is 1 are goals (`data.positive`); without labels, all scored rows are. Items that the user
already had stay in the ranking; `--config.head.drop_seen=True` leaves them out. Sizes
follow from the counts of the data set (tokenrec/config/data_sizes.py).
"""

from tokenrec.config import (
    Config,
    DataConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    TokensConfig,
    TrainConfig,
)
from tokenrec.config.data_sizes import (
    WARMUP_STEPS,
    data_sizes,
    evaluation_steps,
    fitting_batch,
    fitting_epochs,
    history_events,
)
from tokenrec.data.metadata import Metadata
from tokenrec.errors import InputError

# Above this many items the full softmax costs more than the rest of the model.
FULL_SOFTMAX_ITEMS = 20_000


def get_config(data: Metadata | None) -> Config:
    sizes = data_sizes(data)
    if data is not None and not sizes.events:
        raise InputError(
            "config 'retriever' learns from events, and the train split has none; "
            "prepare the log with rows that are events"
        )
    events = history_events(sizes)
    # A stream goes on after `events - overlap` events, so these make an epoch.
    overlap = events // 2
    streams = max(sizes.events // (events - overlap), sizes.users)
    batch_size = fitting_batch(64, streams)
    # Many passes over a short log, few over a long one.
    epochs = fitting_epochs(15 if sizes.events < 500_000 else 2, streams, batch_size)
    between = evaluation_steps(epochs, streams, batch_size)
    wide = sizes.events >= 5_000_000
    sampled = sizes.items > FULL_SOFTMAX_ITEMS
    return Config(
        data=DataConfig(
            objective="retrieval",
            positive=data.schema.tasks[0].name if data and data.schema.tasks else "",
            paradigm="uc",
            events=events,
            overlap=overlap,
            buckets=(events // 4,),
            batch_size=batch_size,
            eval_batch_size=4 * batch_size,
        ),
        tokens=TokensConfig(
            embedding_dim=32 if sizes.events >= 50_000 else 16,
            fused=True,
            user_tokens=1,
        ),
        model=ModelConfig(
            width=128 if wide else 64,
            heads=2,
            layers=4 if wide else 2,
            windows=(),
            dropout=0.2,
        ),
        head=HeadConfig(
            negatives=1_024 if sampled else 0, cosine=True, temperature=0.07
        ),
        optim=OptimConfig(
            steps=0,
            epochs=epochs,
            warmup_steps=WARMUP_STEPS,
            learning_rate=2e-3,
            # Item vectors of a sampled softmax are table rows and want a high rate.
            table_learning_rate=0.3 if sampled else 0.05,
        ),
        train=TrainConfig(
            eval_every=between,
            eval_split="valid" if sizes.has_valid else "",
            eval_samples=5_000,
            save_every=between,
        ),
    )

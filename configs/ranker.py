"""Ranker for any prepared data set with labels: will this user take this item?

Command:
    tokenrec prepare SOURCE ... --out data/mine
    tokenrec train --config=ranker --data data/mine --workdir=runs/mine
    tokenrec evaluate --workdir=runs/mine --split=test --baselines
From a clone, `tokenrec train --config=configs/ranker.py` is the same.
Hardware: a few CPU cores up to millions of log rows, an accelerator beyond.
Time: MovieLens-100K about a minute, KuaiRand-Pure's log (170,000 rows, 4 tasks) two, on
    2 CPU cores.
Score: test AUC 0.7597, GAUC 0.7074 on MovieLens-100K as `tokenrec init` proposes it (four
    stars or more, 1 seed).
Source: docs/tutorial.md.

The tasks and their weights are those of the data set, and all of its features are read.
Width, depth, batch, epochs and the length of histories follow from its counts
(tokenrec/config/data_sizes.py). Every field can be overridden: `--config.optim.epochs`.
"""

from tokenrec.config import (
    Config,
    DataConfig,
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
    model_size,
    shrinking_windows,
)
from tokenrec.data.metadata import Metadata
from tokenrec.errors import InputError


def get_config(data: Metadata | None) -> Config:
    sizes = data_sizes(data)
    if data is not None and not data.schema.tasks:
        raise InputError(
            "config 'ranker' learns labels, and the data set has no task; use "
            "--config=retriever, or add a task to the schema and prepare it again"
        )
    size = model_size(sizes.labelled)
    batch_size = fitting_batch(size.batch_size, sizes.labelled)
    events = history_events(sizes)
    # A second look at each row helps while there are few; on long logs it overfits the
    # embedding tables.
    epochs = fitting_epochs(
        2 if sizes.labelled < 1_000_000 else 1, sizes.labelled, batch_size
    )
    between = evaluation_steps(epochs, sizes.labelled, batch_size)
    return Config(
        data=DataConfig(
            paradigm="nio",
            events=events,
            buckets=(events // 4,),
            batch_size=batch_size,
            eval_batch_size=2 * batch_size,
        ),
        tokens=TokensConfig(embedding_dim=16, fused=True, user_tokens=1),
        model=ModelConfig(
            width=size.width,
            heads=size.heads,
            layers=size.layers,
            windows=shrinking_windows(size.layers, events),
            dropout=0.1,
        ),
        optim=OptimConfig(
            steps=0,
            epochs=epochs,
            warmup_steps=WARMUP_STEPS,
            learning_rate=2e-3 if size.width <= 64 else 1e-3,
            table_learning_rate=0.05,
        ),
        train=TrainConfig(
            eval_every=between,
            eval_split="valid" if sizes.has_valid else "",
            eval_samples=20_000,
            save_every=between,
        ),
    )

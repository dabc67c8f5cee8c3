r"""KuaiRand-Pure, user-centric: streams of a user's impressions, a prediction at each.

Command:
    tokenrec prepare kuairand --root DIR --out data/kuairand_pure \
        --valid-from 2022-05-03 --test-from 2022-05-05
    tokenrec train --config=configs/kuairand_pure_uc.py --workdir=runs/kuairand_pure_uc
    tokenrec evaluate --workdir=runs/kuairand_pure_uc --split=valid
Hardware: 2 CPU cores.
Time: about 5 CPU minutes.
Score: valid AUC is_click 0.7547 ± 0.0002, long_view 0.7579 ± 0.0003 (3 seeds).
Source: benchmarks/results/kuairand_pure.md.

Settings were compared on 2 May, the last day of train
(benchmarks/results/kuairand_pure_tuning.md); a third epoch loses clicks. Earlier events
whose long-view label is known carry loss too.
"""

from tokenrec.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TokensConfig,
    TrainConfig,
)

EXCLUDE = ("user_id",)


def get_config() -> Config:
    return Config(
        data=DataConfig(
            name="kuairand_pure",
            exclude=EXCLUDE,
            tasks={"is_click": 1.0, "long_view": 1.0},
            paradigm="uc",
            events=64,
            overlap=50,
            buckets=(24, 44),
            # Rows of the history file have a label and no statistics: with their full
            # weight they are most of the loss of long views.
            unscored_weight=0.2,
            batch_size=64,
            eval_batch_size=128,
        ),
        tokens=TokensConfig(embedding_dim=16, user_tokens=4),
        model=ModelConfig(
            width=64, heads=2, layers=4, windows=(32, 16), dropout=0.1, branch="mean"
        ),
        optim=OptimConfig(
            steps=0,
            epochs=2,
            warmup_steps=60,
            learning_rate=1e-3,
            # At 0.05 the tables of single ids memorise in the second epoch.
            table_learning_rate=0.01,
        ),
        train=TrainConfig(),
    )

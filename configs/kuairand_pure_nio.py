r"""KuaiRand-Pure, new impression only: one stream per impression, 50 events of history.

Command:
    tokenrec prepare kuairand --root DIR --out data/kuairand_pure \
        --valid-from 2022-05-03 --test-from 2022-05-05
    tokenrec train --config=configs/kuairand_pure_nio.py \
        --workdir=runs/kuairand_pure_nio
    tokenrec evaluate --workdir=runs/kuairand_pure_nio --split=valid
Hardware: 2 CPU cores.
Time: about 6 CPU minutes.
Score: valid AUC is_click 0.7540 ± 0.0003, long_view 0.7582 ± 0.0002 (3 seeds).
Source: benchmarks/results/kuairand_pure.md.

Each event is one token. The inputs are those of `kuairand_pure_uc` without the tables
of single ids, and both configs are scored on the same impressions.
"""

from tokenrec.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TokensConfig,
    TrainConfig,
)

EXCLUDE = ("user_id", "video_id", "author_id", "music_id")


def get_config() -> Config:
    return Config(
        data=DataConfig(
            name="kuairand_pure",
            exclude=EXCLUDE,
            tasks={"is_click": 1.0, "long_view": 1.0},
            paradigm="nio",
            events=50,
            buckets=(25,),
            batch_size=256,
            eval_batch_size=512,
        ),
        tokens=TokensConfig(embedding_dim=16, fused=True, user_tokens=4),
        model=ModelConfig(
            width=64, heads=2, layers=4, windows=(32, 16), dropout=0.1, branch="mean"
        ),
        optim=OptimConfig(
            steps=0,
            epochs=2,
            warmup_steps=60,
            learning_rate=1e-3,
            table_learning_rate=0.05,
        ),
        train=TrainConfig(),
    )

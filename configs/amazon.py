"""Amazon Beauty and Toys: predict the next item of a user among all 12,000 items.

Command:
    tokenrec prepare amazon --root DIR --name Beauty --out data/amazon_beauty
    tokenrec train --config=configs/amazon.py --workdir=runs/amazon_beauty
    tokenrec evaluate --workdir=runs/amazon_beauty --split=test
For Toys: --name Toys_and_Games, data/amazon_toys and --config.data.name=amazon_toys.
Hardware: 1 CPU core.
Time: about 5 minutes, 240 CPU seconds of training.
Score: test Recall@10, NDCG@10 (3 seeds). Beauty 0.0858 ± 0.0011, 0.0511 ± 0.0005; with
    seen items ranked too 0.0775 ± 0.0009, 0.0430 ± 0.0003. Toys 0.0879 ± 0.0006,
    0.0543 ± 0.0004; with seen items ranked too 0.0808 ± 0.0008, 0.0459 ± 0.0003.
Source: benchmarks/results/amazon.md.

The split is leave-one-out: the last item of a user is test, the one before it valid.
Every event of a stream predicts the next one.
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


def get_config() -> Config:
    return Config(
        data=DataConfig(
            name="amazon_beauty",
            objective="retrieval",
            paradigm="uc",
            events=50,
            overlap=25,
            buckets=(2, 4, 8, 16),
            batch_size=64,
            eval_batch_size=256,
        ),
        tokens=TokensConfig(embedding_dim=16, fused=True),
        model=ModelConfig(width=128, heads=2, layers=2, windows=(), dropout=0.4),
        # Nobody reviews an item twice here, so seen items need no place in the ranking.
        head=HeadConfig(
            negatives=1_024,
            cosine=True,
            temperature=0.07,
            item_features=("attributes",),
            drop_seen=True,
        ),
        optim=OptimConfig(
            steps=0,
            epochs=15,
            warmup_steps=300,
            learning_rate=2e-3,
            table_learning_rate=0.3,
            weight_decay=0.05,
        ),
        train=TrainConfig(save_every=1_750, log_every=50),
    )

"""Amazon Beauty and Toys: generate the semantic id of the next item, code by code.

Command:
    tokenrec prepare amazon --root DIR --name Beauty --out data/amazon_beauty
    tokenrec semantic-ids --data data/amazon_beauty --out data/amazon_beauty_ids
    tokenrec train --config=configs/amazon_generative.py \
        --workdir=runs/amazon_beauty_generative
    tokenrec evaluate --workdir=runs/amazon_beauty_generative --split=test
For Toys: --name Toys_and_Games, data/amazon_toys, --config.data.name=amazon_toys and
    --config.data.semantic_ids=amazon_toys_ids.
Hardware: 1 CPU core.
Time: about 13 minutes, 1.5 million goals at 1,900 per second on an idle machine.
Score: Beauty, test Recall@10 0.0626, NDCG@10 0.0331 (1 seed). Toys: not measured.
Source: benchmarks/results/amazon_beauty_generative.md.

The semantic ids are made from co-occurrence in the training split.
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
            semantic_ids="amazon_beauty_ids",
            objective="retrieval",
            paradigm="uc",
            events=50,
            overlap=25,
            buckets=(2, 4, 8, 16),
            batch_size=64,
            eval_batch_size=256,
        ),
        tokens=TokensConfig(embedding_dim=32, fused=True),
        model=ModelConfig(width=64, heads=2, layers=4, windows=(), dropout=0.3),
        # Nobody reviews an item twice here.
        head=HeadConfig(retrieval="semantic_id", tied=False, beams=30, drop_seen=True),
        optim=OptimConfig(
            steps=3_500, warmup_steps=200, learning_rate=2e-3, table_learning_rate=0.3
        ),
        train=TrainConfig(
            eval_every=1_750, eval_samples=1_000, save_every=1_750, log_every=50
        ),
    )

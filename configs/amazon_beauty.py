"""Amazon Beauty: the next item of a user, among all 12,101.

tokenrec prepare amazon --root DIR --name Beauty --out data/amazon_beauty
tokenrec train --config=configs/amazon_beauty.py --workdir=runs/amazon_beauty
tokenrec evaluate --workdir=runs/amazon_beauty --split test --json runs/amazon_beauty/test.json
"""

from tokenrec.config import Config, DataConfig, HeadConfig, ModelConfig, OptimConfig, TokensConfig, TrainConfig


def get_config() -> Config:
    return Config(
        data=DataConfig(
            name="amazon_beauty",
            objective="retrieval",
            paradigm="uc",
            events=50,
            overlap=25,
            buckets=(2, 4, 8, 16),
            batch_size=256,
            eval_batch_size=256,
        ),
        tokens=TokensConfig(embedding_dim=16, fused=True),
        model=ModelConfig(width=64, heads=2, layers=2, windows=(), dropout=0.3),
        head=HeadConfig(temperature=1.0),
        optim=OptimConfig(steps=4_000, warmup_steps=200, learning_rate=1e-3, weight_decay=0.01),
        train=TrainConfig(eval_every=500, save_every=500, log_every=50),
    )

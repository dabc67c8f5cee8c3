"""KuaiRand-Pure, new impression only: one stream per impression, read out at its target.

    tokenrec prepare kuairand --root DIR --out data/kuairand_pure --valid-from 2022-05-03 --test-from 2022-05-05
    tokenrec train --config=configs/kuairand_pure_nio.py --workdir=runs/kuairand_pure_nio

Hardware: a CPU with 2 cores. Time and expected figures: see benchmarks/results.

The same impressions and metrics as `kuairand_pure_uc`, with one fused token per event.
"""

from tokenrec.config import Config, DataConfig, ModelConfig, OptimConfig, TokensConfig, TrainConfig


def get_config() -> Config:
    return Config(
        data=DataConfig(
            name="kuairand_pure",
            tasks={"is_click": 1.0, "long_view": 1.0},
            paradigm="nio",
            events=50,
            batch_size=256,
            eval_batch_size=512,
        ),
        tokens=TokensConfig(embedding_dim=16, user_tokens=4, fused=True),
        model=ModelConfig(width=64, heads=2, layers=4, windows=(32, 16), dropout=0.1),
        optim=OptimConfig(steps=500, warmup_steps=50, learning_rate=1e-3, table_learning_rate=0.05),
        train=TrainConfig(eval_every=250, save_every=250),
    )

"""Synthetic log with a known best AUC: a run of seconds that shows every part working.

Command:
    tokenrec prepare synthetic --rows 20000 --out data/synthetic
    tokenrec train --config=configs/synthetic.py --workdir=runs/synthetic
Hardware: 1 CPU core.
Time: well under a minute.
Score: valid AUC click 0.52, buy 0.52: 200 steps are too few to learn this log. The best
    possible AUC is 0.8157 and 0.8242.
Source: the command above; `SyntheticSource.best_auc` for the best possible AUC.
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
            name="synthetic",
            paradigm="nio",
            events=16,
            batch_size=64,
            eval_batch_size=256,
        ),
        tokens=TokensConfig(embedding_dim=8, fused=True, user_tokens=1),
        model=ModelConfig(width=32, heads=2, layers=2, windows=(8,)),
        optim=OptimConfig(steps=200, warmup_steps=20, learning_rate=3e-3),
        train=TrainConfig(eval_every=100, save_every=100),
    )

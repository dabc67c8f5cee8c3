r"""KuaiRand-27K on a TPU pod, user-centric: 32 million videos, 2,048 events a stream.

Command:
    tokenrec compile --config=configs/kuairand_27k.py --topology v5p:8x8x8
    tokenrec prepare kuairand --root DIR --download 27k --out data/kuairand_27k \
        --valid-from 2022-05-03 --test-from 2022-05-05 --statistics none
    tokenrec train --config=configs/kuairand_27k.py --workdir=runs/kuairand_27k \
        --distributed
Hardware: 512 TPU v5p chips.
Time: at least 4.5 ms per step, by the roofline of the compiled step.
Score: none. Nobody has trained it; the number of steps is a plan.
Source: benchmarks/results/pods.md.

A user has some 11,800 log rows, so nearly every stream continues another one: 256 of
its events are history only, and 1,792 carry loss. Of the 8 layers 2 are full and 6 have
windows that shrink from bottom to top (BFTS). Until the data set is prepared, `compile`
and `describe` read table sizes from configs/schemas/kuairand_27k.json; some of them are
assumptions.
"""

from tokenrec.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TokensConfig,
    TrainConfig,
)

CHIPS = 512
# Streams per chip.
STREAMS = 2


def get_config() -> Config:
    return Config(
        data=DataConfig(
            name="kuairand_27k",
            schema="kuairand_27k.json",
            exclude=("user_id",),
            tasks={"is_click": 1.0, "long_view": 1.0},
            paradigm="uc",
            events=2048,
            overlap=256,
            batch_size=STREAMS * CHIPS,
            eval_batch_size=STREAMS * CHIPS,
        ),
        tokens=TokensConfig(embedding_dim=16, user_tokens=7),
        model=ModelConfig(
            width=512,
            heads=4,
            layers=8,
            windows=(1024, 512, 512, 256, 256, 128),
            dtype="bfloat16",
            remat="none",
        ),
        optim=OptimConfig(
            steps=10_000, warmup_steps=500, learning_rate=1e-3, table_learning_rate=0.05
        ),
        mesh=MeshConfig(data=512),
        train=TrainConfig(eval_every=1000, save_every=1000),
    )

r"""Large recommendation model for a TPU pod: 1.27 billion dense weights, KuaiRand-27K.

Command:
    tokenrec compile --config=configs/lrm_1b.py --topology v5p:8x8x8
    tokenrec prepare kuairand --root DIR --download 27k --out data/kuairand_27k \
        --valid-from 2022-05-03 --test-from 2022-05-05 --statistics none
    tokenrec train --config=configs/lrm_1b.py --workdir=runs/lrm_1b --distributed
Hardware: 512 TPU v5p chips.
Time: 211 ms per step on 64 chips by the compiler's schedule, 151 ms at least.
Score: none. Nobody has trained it; the number of steps is a plan.
Source: benchmarks/results/pods.md.

A user-centric causal decoder without windows or gate. A stream has 2,048 tokens: 15
soft tokens of the user, a separator, and a state and an action token for each of 1,016
events. Heads of width 128 suit the attention kernels. Until the data set is prepared,
`compile` and `describe` read table sizes from configs/schemas/kuairand_27k.json; some
of them are assumptions.
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
STREAMS = 4


def get_config() -> Config:
    return Config(
        data=DataConfig(
            name="kuairand_27k",
            schema="kuairand_27k.json",
            exclude=("user_id",),
            tasks={"is_click": 1.0, "long_view": 1.0},
            paradigm="uc",
            events=1016,
            overlap=256,
            batch_size=STREAMS * CHIPS,
            eval_batch_size=STREAMS * CHIPS,
        ),
        tokens=TokensConfig(
            embedding_dim=16, user_tokens=15, hidden=1024, output_scale=True
        ),
        model=ModelConfig(
            width=2048,
            heads=16,
            layers=24,
            windows=(),
            gate=False,
            ffn_width=5632,
            qk_norm=True,
            dtype="bfloat16",
            remat="dots",
            # A loop over the layers would copy what they keep, and let no layer's work
            # hide the gathers of another.
            scan=0,
        ),
        optim=OptimConfig(
            steps=5000,
            warmup_steps=500,
            learning_rate=3e-4,
            weight_decay=0.1,
            beta2=0.95,
        ),
        mesh=MeshConfig(data=8, fsdp=64),
        train=TrainConfig(eval_every=1000, save_every=500),
    )

r"""A large recommendation model: 1.2 billion dense weights over soft tokens of KuaiRand-27K, for a pod.

    tokenrec compile --config=configs/lrm_1b.py --topology v5p:8x8x8
    tokenrec prepare kuairand --root DIR --download 27k --out data/kuairand_27k --valid-from 2022-05-03 \
        --test-from 2022-05-05
    tokenrec train --config=configs/lrm_1b.py --workdir=runs/lrm_1b --distributed

Hardware: 512 TPU v5p chips. Nobody has trained it: benchmarks/results/pods.md has what the compiler says of it, and
`steps` is a plan. Before the data is prepared, `compile` and `describe` read the sizes of its tables from
configs/schemas/kuairand_27k.json, where some are assumptions.

User-centric, as a causal decoder without windows or gate: 15 soft tokens of the user, a separator, and 1,016 events of
a state and an action token each, 2,048 tokens in all. Attention heads of 128 are what the kernels like best.
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
STREAMS = 4  # of a chip


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

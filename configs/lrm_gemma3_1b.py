r"""Large recommendation model that starts from Gemma 3 1B: Complete Journey, for a pod.

Command:
    tokenrec compile --config=configs/lrm_gemma3_1b.py --topology v5e:16x16
    tokenrec train --config=configs/lrm_gemma3_1b.py --workdir=runs/lrm_gemma3_1b \
        --config.model.architecture= --config.model.pretrained=models/gemma-3-1b-it \
        --distributed
Hardware: 256 TPU v5e chips.
Time: 397 ms per step by the compiler's schedule, 181 ms at least.
Score: none. Nobody has trained it; the number of steps is a plan.
Source: benchmarks/results/pods.md.

A sample is a basket. Its eight candidates share a prompt of the household, its last
406 purchases as fused soft tokens, and the basket; each has its title in words and a
soft token. That makes 512 tokens. `model.architecture` gives the sizes alone, so that
`compile` and `describe` need no weights; a run takes those of `model.pretrained`, and
texts must be prepared with its tokenizer (`tokenrec prepare --tokenizer`).

Every weight is trained. `--config.tuning.method=lora` leaves those of the checkpoint
frozen; the adapters want `--config.optim.learning_rate=2e-4`.
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

CHIPS = 256
# Streams per chip.
STREAMS = 16


def get_config() -> Config:
    return Config(
        data=DataConfig(
            name="complete_journey",
            paradigm="nio",
            events=406,
            candidates=8,
            batch_size=STREAMS * CHIPS,
            eval_batch_size=STREAMS * CHIPS,
        ),
        tokens=TokensConfig(
            embedding_dim=16,
            fused=True,
            user_tokens=1,
            prompt=("user", "history", "query", "||", "title", "candidate"),
            output_scale=True,
        ),
        model=ModelConfig(
            kind="gemma3",
            architecture="gemma3_1b",
            windows=(),
            dtype="bfloat16",
            remat="dots",
        ),
        optim=OptimConfig(
            steps=2000,
            warmup_steps=100,
            learning_rate=2e-5,
            beta2=0.95,
        ),
        mesh=MeshConfig(data=16, fsdp=16),
        train=TrainConfig(eval_every=500, save_every=250),
    )

r"""Large recommendation model that starts from Qwen 3 4B: Complete Journey, for a pod.

Command:
    tokenrec compile --config=configs/lrm_qwen3_4b.py --topology v5p:4x4x4
    tokenrec train --config=configs/lrm_qwen3_4b.py --workdir=runs/lrm_qwen3_4b \
        --config.model.architecture= --config.model.pretrained=models/Qwen3-4B \
        --distributed
Hardware: 64 TPU v5p chips.
Time: 648 ms per step by the compiler's schedule, 408 ms at least.
Score: none. Nobody has trained it; the number of steps is a plan.
Source: benchmarks/results/pods.md.

A sample is a basket. Its eight candidates share a prompt of the household, its last
406 purchases as fused soft tokens, and the basket; each has its title in words and a
soft token. That makes 512 tokens. `model.architecture` gives the sizes alone, so that
`compile` and `describe` need no weights; a run takes those of `model.pretrained`, and
texts must be prepared with its tokenizer (`tokenrec prepare --tokenizer`).

Every weight is trained. `--config.tuning.method=lora` leaves those of the checkpoint
frozen; the adapters want `--config.optim.learning_rate=1e-4`.
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

CHIPS = 64
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
            kind="qwen3",
            architecture="qwen3_4b",
            windows=(),
            dtype="bfloat16",
            remat="dots",
        ),
        optim=OptimConfig(
            steps=2000,
            warmup_steps=100,
            learning_rate=1e-5,
            beta2=0.95,
        ),
        mesh=MeshConfig(data=4, fsdp=16),
        train=TrainConfig(eval_every=500, save_every=250),
    )

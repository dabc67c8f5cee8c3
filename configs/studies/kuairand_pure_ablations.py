"""KuaiRand-Pure, user-centric: the paper's ablations of the backbone and of the stream.

    tokenrec prepare kuairand --root DIR --out data/kuairand_pure --valid-from 2022-05-03 --test-from 2022-05-05
    tokenrec study --config=configs/studies/kuairand_pure_ablations.py --out=studies/kuairand_pure_ablations

Hardware and time: a CPU with 2 cores, some 6 CPU-minutes a run, 65 runs; it goes on when it is started again.

`XF YS` has X full layers below Y sliding ones. A window above a full layer counts rows, of which an event has two.
"""

from tokenrec.study.plan import Study

PLAIN = {"model.gate": False, "model.windows": ()}

MODELS = {
    "tokenformer": {},  # 2F2S with the gate, windows 32 and 16
    "transformer": PLAIN,  # 4F without
    "bfts": {"model.gate": False},
    "nlir": {"model.windows": ()},
    "3F1S": {"model.windows": (32,)},
    "1F3S": {"model.windows": (64, 32, 16)},
    "4S": {"model.windows": (64, 64, 32, 16)},
    "equal-windows": {"model.windows": (32, 32)},
    "4F-no-static": {**PLAIN, "tokens.prompt": ("history",)},
    "4S-no-static": {"model.windows": (64, 64, 32, 16), "tokens.prompt": ("history",)},
    "gate-bias-0": {"model.gate_bias": 0.0},
    "gate-bias-2": {"model.gate_bias": 2.0},
    "qk-norm": {"model.qk_norm": True},
}


def get_study() -> Study:
    return Study(
        base="kuairand_pure_uc",
        models=MODELS,
        reference="tokenformer",
        learning_rates=(5e-4, 1e-3, 2e-3),
        seeds=(0, 1, 2),
        overrides={"train.eval_samples": 2_000, "train.eval_every": 146},
        cpu_hours=6.5,
    )

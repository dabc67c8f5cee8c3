"""KuaiRand-Pure, user-centric: the paper's ablations of the backbone and of the stream.

    tokenrec prepare kuairand --root DIR --out data/kuairand_pure --valid-from 2022-05-03 --test-from 2022-05-05
    tokenrec study --config=configs/studies/kuairand_pure_ablations.py --data data/kuairand_pure \
        --out studies/kuairand_pure_ablations --side-by-side 2

Hardware and time: a CPU with 2 cores, some 3 CPU-minutes a run, 36 runs; it goes on when it is started again.

One learning rate, the best of TokenFormer and of the transformer in `kuairand_pure_rivals`, which has BFTS alone and
NLIR alone, too. `XFYS` has X full layers below Y sliding ones, 2S2F sliding ones below. Windows count rows, of which an
event has two.
"""

from tokenrec.study.plan import Study

PLAIN = {"model.gate": False, "model.windows": ()}

MODELS = {
    "tokenformer": {},  # 2F2S with the gate, windows 32 and 16
    "transformer": PLAIN,
    "4F-no-static": {**PLAIN, "tokens.prompt": ("history",)},
    "4S": {"model.windows": (64, 64, 32, 16)},
    "additive-positions": {"model.positions": "additive"},
    "2S2F": {"model.windows": (32, 16, 0, 0)},
    "3F1S": {"model.windows": (32,)},
    "1F3S": {"model.windows": (64, 32, 16)},
    "static-kept": {"model.discard_static": False},
    "gate-bias-0": {"model.gate_bias": 0.0},
    "gate-bias-2": {"model.gate_bias": 2.0},
    "equal-windows": {"model.windows": (32, 32)},
}


def get_study() -> Study:
    return Study(
        base="kuairand_pure_uc",
        models=MODELS,
        reference="tokenformer",
        learning_rates=(1e-3,),
        seeds=(0, 1, 2),
        splits=(
            "valid",
        ),  # the part of the log that targets are stated for ends on 4 May
        overrides={
            "train.eval_samples": 1_000,
            "train.eval_every": 219,
            "train.log_states": True,
        },
        cpu_hours=2.5,
    )

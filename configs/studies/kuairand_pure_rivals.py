"""KuaiRand-Pure, user-centric: learning rates for TokenFormer, its parts, and the rivals that score each event.

One seed; `kuairand_pure_rivals_seeds` trains with three what is found here.

    tokenrec prepare kuairand --root DIR --out data/kuairand_pure --valid-from 2022-05-03 --test-from 2022-05-05
    tokenrec study --config=configs/studies/kuairand_pure_rivals.py --data data/kuairand_pure \
        --out studies/kuairand_pure_rivals --side-by-side 2

Hardware and time: a CPU with 2 cores, some 3 to 6 CPU-minutes a run, 30 runs; it goes on when it is started again.

All have the same inputs, makers, head, losses, table rate, dropout, width, batches and steps. Where a rival's own shape
is a choice (layers, heads), docs/rivals.md says which was made. OneTrans and LONGER read one target a stream, and stand
in `kuairand_pure_rivals_nio`.
"""

from tokenrec.study.plan import Study

ALL_FULL = {"model.windows": ()}

MODELS = {
    "tokenformer": {},  # 2F2S with the gate, windows 32 and 16
    "transformer": {**ALL_FULL, "model.gate": False},
    "bfts": {"model.gate": False},
    "nlir": ALL_FULL,
    "rankmixer": {
        **ALL_FULL,
        "model.kind": "rankmixer",
        "model.heads": 8,
        "model.layers": 2,
    },
    "din": {**ALL_FULL, "model.kind": "din", "model.layers": 2},
    "dcnv2": {**ALL_FULL, "model.kind": "dcnv2", "model.layers": 3},
    "sasrec": {**ALL_FULL, "model.kind": "sasrec"},
    "hstu": {**ALL_FULL, "model.kind": "hstu"},
    "hstu-semi-local": {"model.kind": "hstu"},
}


def get_study() -> Study:
    return Study(
        base="kuairand_pure_uc",
        models=MODELS,
        reference="tokenformer",
        learning_rates=(4e-4, 1e-3, 2.5e-3),
        seeds=(0,),
        splits=(
            "valid",
        ),  # the part of the log that targets are stated for ends on 4 May
        overrides={"train.eval_samples": 1_000, "train.eval_every": 219},
        cpu_hours=3.5,
    )

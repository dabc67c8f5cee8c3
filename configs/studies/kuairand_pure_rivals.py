r"""KuaiRand-Pure, user-centric: learning rates of backbones that score every event.

Command:
    tokenrec prepare kuairand --root DIR --out data/kuairand_pure \
        --valid-from 2022-05-03 --test-from 2022-05-05
    tokenrec study --config=configs/studies/kuairand_pure_rivals.py \
        --data data/kuairand_pure --out studies/kuairand_pure_rivals --side-by-side 2
Hardware: 2 CPU cores.
Time: 30 runs of 3 to 6 CPU-minutes; rerun the command to resume.
Score: benchmarks/results/studies/kuairand_pure_rivals.md.

One seed; `kuairand_pure_rivals_seeds` trains the rates found here with three. All
models have the same inputs, makers, head, losses, table learning rate, dropout, width,
batches and steps. docs/guides/backbones.md explains the layers and heads chosen for
each. OneTrans and LONGER read one target per stream: see `kuairand_pure_rivals_nio`.
"""

from tokenrec.study.plan import Study

ALL_FULL = {"model.windows": ()}

MODELS = {
    # 2F2S with the gate, windows 32 and 16.
    "tokenformer": {},
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
        # The figures of other systems are for valid, which ends on 4 May.
        splits=("valid",),
        overrides={"train.eval_samples": 1_000, "train.eval_every": 219},
        cpu_hours=3.5,
    )

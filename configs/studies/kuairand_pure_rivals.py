r"""KuaiRand-Pure, user-centric: learning rates of backbones, searched on 2 May alone.

Command:
    tokenrec prepare kuairand --root DIR --out data/kuairand_pure_tune \
        --valid-from 2022-05-02 --test-from 2022-05-03
    tokenrec study --config=configs/studies/kuairand_pure_rivals.py \
        --data data/kuairand_pure_tune --out studies/kuairand_pure_rivals \
        --side-by-side 2
Hardware: 2 CPU cores.
Time: 16 runs of 3 to 8 CPU-minutes; rerun the command to resume.
Score: benchmarks/results/studies/kuairand_pure_rivals.md.

One seed, trained to 1 May; the rivals for one epoch and for two. 2 May is the last day
of what `kuairand_pure_rivals_seeds` trains on with the rates found here, so that no
rate is chosen on a day that it reports. All models have the same inputs, makers, head,
losses, table learning rate, dropout, width and batches. docs/guides/backbones.md
explains the layers and heads chosen for each. OneTrans and LONGER read one target per
stream: see `kuairand_pure_rivals_nio`.
"""

from tokenrec.study.plan import Study

ALL_FULL = {"model.windows": ()}
RIVAL = {**ALL_FULL, "model.branch": "none"}

RIVALS = {
    "rankmixer": {
        **RIVAL,
        "model.kind": "rankmixer",
        "model.heads": 8,
        "model.layers": 2,
    },
    "din": {**RIVAL, "model.kind": "din", "model.layers": 2},
    "dcnv2": {**RIVAL, "model.kind": "dcnv2", "model.layers": 3},
    "hstu": {**RIVAL, "model.kind": "hstu"},
}
# The epochs of the base were tuned for TokenFormer.
ONE_EPOCH = {
    f"{name}-1-epoch": {**fields, "optim.epochs": 1} for name, fields in RIVALS.items()
}
MODELS = {
    # 2F2S with the gate, windows 32 and 16, and a branch beside it.
    "tokenformer": {},
    "tokenformer-alone": {"model.branch": "none"},
    **RIVALS,
    **ONE_EPOCH,
}


def get_study() -> Study:
    return Study(
        base="kuairand_pure_uc",
        models=MODELS,
        reference="tokenformer",
        learning_rates=(1e-3, 2.5e-3),
        # Half as many steps: the higher rate.
        own_rates=dict.fromkeys(ONE_EPOCH, (2.5e-3,)),
        seeds=(0,),
        splits=("valid",),
        cpu_hours=3,
    )

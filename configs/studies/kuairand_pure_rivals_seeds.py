r"""KuaiRand-Pure, user-centric: the models of `kuairand_pure_rivals` with three seeds.

Command:
    tokenrec prepare kuairand --root DIR --out data/kuairand_pure \
        --valid-from 2022-05-03 --test-from 2022-05-05
    tokenrec study --config=configs/studies/kuairand_pure_rivals_seeds.py \
        --data data/kuairand_pure --out studies/kuairand_pure_rivals_seeds \
        --side-by-side 2
Hardware: 2 CPU cores.
Time: 18 runs of 4 to 8 CPU-minutes; rerun the command to resume.
Score: benchmarks/results/studies/kuairand_pure_rivals_seeds.md.

Each model has the rate that was best on 2 May in `kuairand_pure_rivals`; 3 and 4 May
are only reported. LightGBM, on the same inputs, is among the baselines with the extra
`baselines`.
"""

from tokenrec.study.plan import Study

ALL_FULL = {"model.windows": ()}
RIVAL = {**ALL_FULL, "model.branch": "none"}

MODELS = {
    "rankmixer": {
        **RIVAL,
        "model.kind": "rankmixer",
        "model.heads": 8,
        "model.layers": 2,
    },
    "din": {**RIVAL, "model.kind": "din", "model.layers": 2},
    "dcnv2": {**RIVAL, "model.kind": "dcnv2", "model.layers": 3},
    "hstu": {**RIVAL, "model.kind": "hstu"},
    "tokenformer-alone": {"model.branch": "none"},
    # 2F2S with the gate, windows 32 and 16, and a branch beside it.
    "tokenformer": {},
}


def get_study() -> Study:
    return Study(
        base="kuairand_pure_uc",
        models=MODELS,
        reference="tokenformer",
        learning_rates=(1e-3,),
        own_rates={"tokenformer-alone": (2.5e-3,), "hstu": (2.5e-3,)},
        seeds=(0, 1, 2),
        # The figures of other systems are for valid, which ends on 4 May.
        splits=("valid",),
        freeze_at="split",
        ensembles={
            "tokenformer, seeds": ("tokenformer",),
            "tokenformer and din": ("tokenformer", "din"),
            "tokenformer and rankmixer": ("tokenformer", "rankmixer"),
        },
        cpu_hours=4,
    )

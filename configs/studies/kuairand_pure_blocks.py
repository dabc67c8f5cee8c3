r"""KuaiRand-Pure, user-centric: windows (BFTS) and gate (NLIR), each alone and neither.

Command:
    tokenrec prepare kuairand --root DIR --out data/kuairand_pure \
        --valid-from 2022-05-03 --test-from 2022-05-05
    tokenrec study --config=configs/studies/kuairand_pure_blocks.py \
        --data data/kuairand_pure --out studies/kuairand_pure_blocks --side-by-side 2
Hardware: 2 CPU cores.
Time: 12 runs of about 5 CPU-minutes; rerun the command to resume.
Score: benchmarks/results/studies/kuairand_pure_blocks.md.

No model has a branch. All have the rate that was best for TokenFormer without one on 2
May, in `kuairand_pure_rivals`.
"""

from tokenrec.study.plan import Study

# Without the branch, so that what a part does is not done beside it.
ALONE = {"model.branch": "none"}
ALL_FULL = {"model.windows": ()}
NO_GATE = {"model.gate": False}

MODELS = {
    "transformer": {**ALONE, **ALL_FULL, **NO_GATE},
    "bfts-alone": {**ALONE, **NO_GATE},
    "nlir-alone": {**ALONE, **ALL_FULL},
    # 2F2S with the gate, windows 32 and 16.
    "tokenformer-alone": ALONE,
}


def get_study() -> Study:
    return Study(
        base="kuairand_pure_uc",
        models=MODELS,
        reference="tokenformer-alone",
        learning_rates=(2.5e-3,),
        seeds=(0, 1, 2),
        # The figures of other systems are for valid, which ends on 4 May.
        splits=("valid",),
        freeze_at="split",
        cpu_hours=1.2,
    )

r"""KuaiRand-Pure, one stream per impression: backbones that read one target.

Command:
    tokenrec prepare kuairand --root DIR --out data/kuairand_pure \
        --valid-from 2022-05-03 --test-from 2022-05-05
    tokenrec study --config=configs/studies/kuairand_pure_rivals_nio.py \
        --data data/kuairand_pure --out studies/kuairand_pure_rivals_nio \
        --side-by-side 2
Hardware: 2 CPU cores.
Time: 16 runs of about 3 CPU-minutes; rerun the command to resume.
Score: benchmarks/results/studies/kuairand_pure_rivals_nio.md.

Half of the steps of `kuairand_pure_nio`. All models try the two learning rates that
were best of the three in `kuairand_pure_rivals`. DIN stands for the models that score
every event; `kuairand_pure_rivals` has the others.
"""

from tokenrec.study.plan import Study

ALL_FULL = {"model.windows": ()}

MODELS = {
    "tokenformer": {},
    "onetrans": {**ALL_FULL, "model.kind": "onetrans"},
    "longer": {**ALL_FULL, "model.kind": "longer"},
    "din": {**ALL_FULL, "model.kind": "din", "model.layers": 2},
}


def get_study() -> Study:
    return Study(
        base="kuairand_pure_nio",
        models=MODELS,
        reference="tokenformer",
        learning_rates=(1e-3, 2.5e-3),
        seeds=(0, 1, 2),
        # The figures of other systems are for valid, which ends on 4 May.
        splits=("valid",),
        overrides={
            "optim.steps": 256,
            "train.eval_samples": 1_000,
            "train.eval_every": 128,
        },
        cpu_hours=1,
    )

"""KuaiRand-Pure, one stream per impression: TokenFormer and the rivals that read one target a stream.

    tokenrec prepare kuairand --root DIR --out data/kuairand_pure --valid-from 2022-05-03 --test-from 2022-05-05
    tokenrec study --config=configs/studies/kuairand_pure_rivals_nio.py --data data/kuairand_pure \
        --out studies/kuairand_pure_rivals_nio --side-by-side 2

Hardware and time: a CPU with 2 cores, some 3 CPU-minutes a run, 16 runs; it goes on when it is started again.

Half of the steps of `kuairand_pure_nio`, and of the three rates of `kuairand_pure_rivals` the two that were best there,
for all alike. DIN stands for those that score events, too; `kuairand_pure_rivals` has the others.
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
        splits=(
            "valid",
        ),  # the part of the log that targets are stated for ends on 4 May
        overrides={
            "optim.steps": 256,
            "train.eval_samples": 1_000,
            "train.eval_every": 128,
        },
        cpu_hours=1,
    )

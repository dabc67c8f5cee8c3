"""Complete Journey: the best of `complete_journey_rivals` after all the steps of the config, four times as many.

    tokenrec prepare complete_journey --out data/complete_journey
    tokenrec study --config=configs/studies/complete_journey_rivals_full.py --data data/complete_journey \
        --out studies/complete_journey_rivals_full --side-by-side 2

Hardware and time: a CPU with 2 cores, some 3 CPU-minutes a run, 13 runs, three seeds; it goes on when it is
started again.

Rates are those that `complete_journey_rivals` chose; TokenFormer tries both.
"""

from tokenrec.study.plan import Study

ALL_FULL = {"model.windows": ()}

MODELS = {
    "tokenformer": {},
    "din": {**ALL_FULL, "model.kind": "din", "model.layers": 2},
    "hstu": {**ALL_FULL, "model.kind": "hstu"},
    "dcnv2": {**ALL_FULL, "model.kind": "dcnv2", "model.layers": 3},
}


def get_study() -> Study:
    return Study(
        base="complete_journey",
        models=MODELS,
        reference="tokenformer",
        learning_rates=(2.5e-3,),
        own_rates={"tokenformer": (1e-3, 2.5e-3)},
        seeds=(0, 1, 2),
        overrides={
            "train.eval_every": 500,
            "train.eval_samples": 500,
            "train.save_every": 0,
        },
        cpu_hours=0.8,
    )

"""Complete Journey: TokenFormer and rivals on baskets, 20 candidates a stream.

    tokenrec prepare complete_journey --out data/complete_journey
    tokenrec study --config=configs/studies/complete_journey_rivals.py --data data/complete_journey \
        --out studies/complete_journey_rivals --side-by-side 2

Hardware and time: a CPU with 2 cores, some 1 CPU-minute a run, 24 runs; it goes on when it is started again.

A quarter of the steps of `complete_journey`, and of the three rates of `kuairand_pure_rivals` the two that were best
there, for all alike. "interleaved" gives an event two tokens, state and action, as the paper does, where the others
have one, and its windows count twice the rows.
"""

from tokenrec.study.plan import Study

ALL_FULL = {"model.windows": ()}

MODELS = {
    "tokenformer": {},
    "transformer": {**ALL_FULL, "model.gate": False},
    "hstu": {**ALL_FULL, "model.kind": "hstu"},
    "din": {**ALL_FULL, "model.kind": "din", "model.layers": 2},
    "dcnv2": {**ALL_FULL, "model.kind": "dcnv2", "model.layers": 3},
    "interleaved": {"tokens.fused": False, "model.windows": (64, 32)},
}


def get_study() -> Study:
    return Study(
        base="complete_journey",
        models=MODELS,
        reference="tokenformer",
        learning_rates=(1e-3, 2.5e-3),
        seeds=(0, 1, 2),
        overrides={
            "optim.steps": 250,
            "optim.warmup_steps": 50,
            "train.eval_every": 125,
            "train.eval_samples": 500,
            "train.save_every": 0,
        },
        cpu_hours=0.6,
    )

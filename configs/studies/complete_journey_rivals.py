r"""Complete Journey: TokenFormer and other backbones on baskets of 20 candidates.

Command:
    tokenrec prepare complete_journey --out data/complete_journey
    tokenrec study --config=configs/studies/complete_journey_rivals.py \
        --data data/complete_journey --out studies/complete_journey_rivals \
        --side-by-side 2
Hardware: 2 CPU cores.
Time: 28 runs of about 1 CPU-minute; rerun the command to resume.
Score: benchmarks/results/studies/complete_journey_rivals.md.

A quarter of the steps of `complete_journey`. All models try the two learning rates that
were best of the three in `kuairand_pure_rivals`. "interleaved" gives an event two
tokens, state and action, as in the paper, where the others have one; its windows count
twice the tokens.
"""

from tokenrec.study.plan import Study

ALL_FULL = {"model.windows": ()}

ALONE = {"model.branch": "none"}
RIVAL = {**ALL_FULL, **ALONE}

MODELS = {
    # With a branch beside the backbone.
    "tokenformer": {},
    "tokenformer-alone": ALONE,
    "transformer": {**RIVAL, "model.gate": False},
    "hstu": {**RIVAL, "model.kind": "hstu"},
    "din": {**RIVAL, "model.kind": "din", "model.layers": 2},
    "dcnv2": {**RIVAL, "model.kind": "dcnv2", "model.layers": 3},
    "interleaved": {**ALONE, "tokens.fused": False, "model.windows": (64, 32)},
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
        cpu_hours=0.8,
    )

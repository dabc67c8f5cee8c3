r"""Complete Journey: the best models of `complete_journey_rivals` with all steps.

Command:
    tokenrec prepare complete_journey --out data/complete_journey
    tokenrec study --config=configs/studies/complete_journey_rivals_full.py \
        --data data/complete_journey --out studies/complete_journey_rivals_full \
        --side-by-side 2
Hardware: 2 CPU cores.
Time: 20 runs of about 3 CPU-minutes; rerun the command to resume.
Score: benchmarks/results/studies/complete_journey_rivals_full.md.

All the steps of the config, four times as many as in `complete_journey_rivals`. All
models choose between two rates on valid; test is only reported.
"""

from tokenrec.study.plan import Study

ALL_FULL = {"model.windows": ()}

RIVAL = {**ALL_FULL, "model.branch": "none"}

MODELS = {
    # With a branch beside the backbone.
    "tokenformer": {},
    "tokenformer-alone": {"model.branch": "none"},
    "din": {**RIVAL, "model.kind": "din", "model.layers": 2},
    "hstu": {**RIVAL, "model.kind": "hstu"},
    "dcnv2": {**RIVAL, "model.kind": "dcnv2", "model.layers": 3},
}


def get_study() -> Study:
    return Study(
        base="complete_journey",
        models=MODELS,
        reference="tokenformer",
        learning_rates=(1e-3, 2.5e-3),
        seeds=(0, 1, 2),
        overrides={
            "train.eval_every": 500,
            "train.eval_samples": 500,
            "train.save_every": 0,
        },
        ensembles={
            "tokenformer, seeds": ("tokenformer",),
            "tokenformer and din": ("tokenformer", "din"),
        },
        cpu_hours=1.5,
    )

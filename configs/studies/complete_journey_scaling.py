r"""Complete Journey: quality against width and depth, at equal data.

Command:
    tokenrec prepare complete_journey --out data/complete_journey
    tokenrec study --config=configs/studies/complete_journey_scaling.py \
        --data data/complete_journey --out studies/complete_journey_scaling
Hardware: 2 CPU cores.
Time: 17 runs of 1 to 3 CPU-minutes; rerun the command to resume.
Score: benchmarks/results/studies/complete_journey_scaling.md.

Three seeds. Models are named `wWIDTH-lLAYERS`; half of their layers have windows, as in
the base config. The largest two also try a lower learning rate.
"""

from tokenrec.study.plan import Study

WINDOWS = {2: (16,), 4: (32, 16), 8: (64, 48, 32, 16)}
SIZES = ((32, 4), (64, 2), (64, 4), (64, 8), (128, 4))


def get_study() -> Study:
    return Study(
        base="complete_journey",
        models={
            f"w{width}-l{layers}": {
                "model.width": width,
                "model.heads": width // 32,
                "model.layers": layers,
                "model.windows": WINDOWS[layers],
            }
            for width, layers in SIZES
        },
        reference="w64-l4",
        learning_rates=(1e-3,),
        own_rates=dict.fromkeys(("w64-l8", "w128-l4"), (4e-4, 1e-3)),
        seeds=(0, 1, 2),
        overrides={
            "optim.steps": 250,
            "optim.warmup_steps": 50,
            "train.eval_every": 125,
            "train.eval_samples": 500,
            "train.save_every": 0,
        },
        cpu_hours=0.7,
    )

"""Complete Journey: width and depth against quality, at equal data.

    tokenrec prepare complete_journey --out data/complete_journey
    tokenrec study --config=configs/studies/complete_journey_scaling.py --data data/complete_journey \
        --out studies/complete_journey_scaling

Hardware and time: a CPU with 2 cores, some 1 to 3 CPU-minutes a run, 17 runs, three seeds; it goes on when it is
started again.

`wWIDTH-lLAYERS`; half of the layers slide, as in the base. The largest two try a lower learning rate, too.
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

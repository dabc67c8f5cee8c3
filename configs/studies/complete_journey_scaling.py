"""Complete Journey: width and depth against quality, at equal data.

    tokenrec prepare complete_journey --out data/complete_journey
    tokenrec study --config=configs/studies/complete_journey_scaling.py --data data/complete_journey \
        --out studies/complete_journey_scaling

Hardware and time: a CPU with 2 cores, an estimated 2 to 12 CPU-minutes a run, one seed; it goes on
when it is started again.

`wWIDTH-lLAYERS`; half of the layers slide, as in the base. Two learning rates each, since wide models want a lower one.
"""

from tokenrec.study.plan import Study

WINDOWS = {2: (16,), 4: (32, 16), 8: (64, 48, 32, 16)}
SIZES = ((32, 4), (64, 2), (64, 4), (64, 8), (128, 4), (128, 8))


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
        learning_rates=(4e-4, 1e-3),
        seeds=(0,),
        overrides={
            "optim.steps": 250,
            "optim.warmup_steps": 50,
            "train.eval_every": 125,
            "train.eval_samples": 500,
            "train.save_every": 0,
        },
        cpu_hours=1,
    )

r"""Complete Journey: history length, from 10 to 500 purchases.

Command:
    tokenrec prepare complete_journey --out data/complete_journey
    tokenrec study --config=configs/studies/complete_journey_length.py \
        --data data/complete_journey --out studies/complete_journey_length
Hardware: 2 CPU cores.
Time: 5 runs of 1 to 6 CPU-minutes; rerun the command to resume.
Score: benchmarks/results/studies/complete_journey_length.md.

One seed. The lowest layers see the whole history, the upper ones its newest 32 and 16
tokens, however long it is.
"""

from tokenrec.study.plan import Study


def get_study() -> Study:
    return Study(
        base="complete_journey",
        models={
            f"T{events}": {"data.events": events} for events in (10, 32, 100, 200, 500)
        },
        reference="T32",
        learning_rates=(1e-3,),
        seeds=(0,),
        overrides={
            "optim.steps": 250,
            "optim.warmup_steps": 50,
            "train.eval_every": 125,
            "train.eval_samples": 500,
            "train.save_every": 0,
        },
        cpu_hours=0.5,
    )

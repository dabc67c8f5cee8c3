"""The smallest study: TokenFormer beside a plain transformer on a synthetic log.

Command:
    tokenrec prepare synthetic --rows 6000 --out data/synthetic
    tokenrec study --config=configs/studies/synthetic.py --out=studies/synthetic
Hardware: 2 CPU cores.
Time: 5 minutes; rerun the command to resume.
Score: none; the study shows the steps, not a difference.
"""

from tokenrec.study.plan import Study


def get_study() -> Study:
    return Study(
        base="synthetic",
        models={
            "tokenformer": {},
            "transformer": {"model.gate": False, "model.windows": ()},
        },
        reference="tokenformer",
        learning_rates=(1e-3, 4e-3),
        seeds=(0, 1),
        overrides={"optim.steps": 60, "optim.warmup_steps": 10},
        cpu_hours=0.3,
    )

"""The smallest study: TokenFormer beside a plain transformer on a synthetic log.

Command:
    tokenrec prepare synthetic --rows 60000 --out data/synthetic
    tokenrec study --config=configs/studies/synthetic.py --out=studies/synthetic
Hardware: 2 CPU cores.
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
        learning_rates=(3e-3, 6e-3),
        seeds=(0, 1),
        cpu_hours=0.3,
    )

r"""KuaiRand-Pure, user-centric: the ablations of the paper, of backbone and stream.

Command:
    tokenrec prepare kuairand --root DIR --out data/kuairand_pure \
        --valid-from 2022-05-03 --test-from 2022-05-05
    tokenrec study --config=configs/studies/kuairand_pure_ablations.py \
        --data data/kuairand_pure --out studies/kuairand_pure_ablations --side-by-side 2
Hardware: 2 CPU cores.
Time: 39 runs of about 6 CPU-minutes; rerun the command to resume.
Score: benchmarks/results/studies/kuairand_pure_ablations.md.

One learning rate, the best one of TokenFormer and of the transformer in
`kuairand_pure_rivals`, which also has BFTS alone and NLIR alone. `XFYS` has X full
layers below Y layers with windows; 2S2F has the windows below. Windows count tokens, of
which an event has two.
"""

from tokenrec.study.plan import Study

# Without the branch, so that what a part does is not done beside it.
ALONE = {"model.branch": "none"}
PLAIN = {**ALONE, "model.gate": False, "model.windows": ()}

MODELS = {
    # 2F2S with the gate, windows 32 and 16.
    "tokenformer": ALONE,
    "transformer": PLAIN,
    "4F-no-static": {**PLAIN, "tokens.prompt": ("history",)},
    "4S": {**ALONE, "model.windows": (64, 64, 32, 16)},
    "additive-positions": {**ALONE, "model.positions": "additive"},
    "2S2F": {**ALONE, "model.windows": (32, 16, 0, 0)},
    "3F1S": {**ALONE, "model.windows": (32,)},
    "1F3S": {**ALONE, "model.windows": (64, 32, 16)},
    "static-kept": {**ALONE, "model.discard_static": False},
    "gate-bias-0": {**ALONE, "model.gate_bias": 0.0},
    "gate-bias-2": {**ALONE, "model.gate_bias": 2.0},
    "equal-windows": {**ALONE, "model.windows": (32, 32)},
    "branch": {},
}


def get_study() -> Study:
    return Study(
        base="kuairand_pure_uc",
        models=MODELS,
        reference="tokenformer",
        learning_rates=(1e-3,),
        seeds=(0, 1, 2),
        # The figures of other systems are for valid, which ends on 4 May.
        splits=("valid",),
        overrides={
            "train.eval_samples": 1_000,
            "train.eval_every": 219,
            "train.log_states": True,
        },
        cpu_hours=4.5,
    )

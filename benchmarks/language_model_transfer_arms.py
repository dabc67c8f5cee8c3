"""Tasks and arms of `benchmarks/language_model_transfer.py`.

The arms of a task read the same samples in the same order for the same steps. They
differ in where the weights of the language model come from, in which of them are
trained, and in whether an event is one soft token or the words of its item's text.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.language_model_transfer_pretrain import KIND
from tokenrec.config import (
    Config,
    DataConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    TokensConfig,
    TrainConfig,
    TuningConfig,
)
from tokenrec.config.validate import validate
from tokenrec.language.architecture import CONFIG_FILE

RATES = (1e-3, 3e-3)
# Of the embedding tables: those of the shipped configs.
TABLE_RATES = {"beauty": 0.3, "complete_journey": 0.05}
LOGS = 20
# What is trained of what, and how an event is written.
ORIGINS = ("scratch", "pretrained", "pretrained, LoRA")
FORMS = ("soft", "text")
TASKS = ("complete_journey", "beauty")
# Counts of the past, which say most of what is bought next without any text or history.
COUNTS = ("household_purchases", "product_sales")


@dataclasses.dataclass(frozen=True)
class Arm:
    """A run, but for its seed.

    Attributes:
      task: in `TASKS`.
      origin: in `ORIGINS`.
      form: in `FORMS`.
    """

    task: str
    origin: str
    form: str


# Seeds of each arm. Beauty has no text: its streams are user-centric, where every event
# is a goal, and `check_user_centric_tokens` refuses a history in words there.
SEEDS = {
    **{Arm("complete_journey", origin, "soft"): 3 for origin in ORIGINS},
    **{Arm("beauty", origin, "soft"): 2 for origin in ORIGINS},
    **{Arm("complete_journey", origin, "text"): 1 for origin in ORIGINS[:2]},
}


@dataclasses.dataclass(frozen=True)
class Size:
    """Size of the runs of a task.

    Attributes:
      steps: steps of a run.
      batch: samples of a step.
      events: longest history.
      evaluated: samples of the evaluation, evenly spread over the test split.
    """

    steps: int
    batch: int
    events: int
    evaluated: int


SIZES = {
    "beauty": Size(250, 32, 8, 1_000),
    "complete_journey": Size(250, 16, 8, 2_000),
}


def arm_config(arm: Arm, work: Path, size: Size, rate: float, seed: int) -> Config:
    """The config of a run.

    Args:
      arm: the arm.
      work: folder of the language model and the data sets.
      size: size of the task's runs.
      rate: peak learning rate.
      seed: seed of the weights that are drawn and of the order of the samples.
    """
    model, untrained = work / "model", work / "untrained"
    source: dict[str, Any] = {"pretrained": str(model)}
    if arm.origin == "scratch":
        source = {"architecture": str(untrained / CONFIG_FILE)}
    lora = arm.origin == "pretrained, LoRA"
    warm_up = size.steps // 10
    return validate(
        Config(
            seed=seed,
            data=_data(arm.task, work, size),
            tokens=_tokens(arm),
            model=ModelConfig(kind=KIND, windows=(), **source),
            tuning=TuningConfig(method="lora") if lora else TuningConfig(),
            head=HeadConfig(retrieval="semantic_id", beams=20, drop_seen=True)
            if arm.task == "beauty"
            else HeadConfig(),
            optim=OptimConfig(
                steps=size.steps,
                warmup_steps=warm_up,
                learning_rate=rate,
                table_learning_rate=TABLE_RATES[arm.task],
            ),
            train=TrainConfig(
                eval_split="",
                save_every=0,
                keep=1,
                log_every=max(size.steps // LOGS, 1),
            ),
        )
    )


def _data(task: str, work: Path, size: Size) -> DataConfig:
    common: dict[str, Any] = {
        "path": str(work / task),
        "events": size.events,
        "batch_size": size.batch,
        "eval_batch_size": 64,
    }
    if task == "beauty":
        return DataConfig(
            objective="retrieval",
            semantic_ids=str(work / "beauty_ids"),
            paradigm="uc",
            overlap=size.events // 2,
            **common,
        )
    return DataConfig(candidates=8, exclude=COUNTS, **common)


def _tokens(arm: Arm) -> TokensConfig:
    template = "Bought{history}{sid}"
    if arm.task == "complete_journey":
        template = "Household{user} bought{history} in this basket{query}||{candidate}"
    return TokensConfig(
        template=template,
        text={"history": ("title",)} if arm.form == "text" else {},
        fused=True,
        user_tokens=1,
        output_scale=True,
    )

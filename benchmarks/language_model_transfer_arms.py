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
# A control: the pretrained numbers of each tensor in random order, all trained. They
# have the sizes of the pretrained weights and none of what these know.
SHUFFLED = "pretrained, shuffled"
# The same with alignment tasks (`head.alignment`) in the loss, at the rate of the arm
# without them.
ALIGNED = ("scratch, aligned", "pretrained, aligned")
ALIGNMENT = {"Which item is{title}?{sid}": 0.5, "Item{sid} is{title}": 0.25}
# Every event of a stream is a goal, unless a form says that the last one alone is.
ONE_GOAL = ("soft, one goal", "text, one goal")
FORMS = ("soft", "text", *ONE_GOAL)
TASKS = ("complete_journey", "beauty")
# Counts of the past, which say most of what is bought next without any text or history.
COUNTS = ("household_purchases", "product_sales")


@dataclasses.dataclass(frozen=True)
class Arm:
    """A run, but for its seed.

    Attributes:
      task: in `TASKS`.
      origin: in `ORIGINS` or `ALIGNED`, or `SHUFFLED`.
      form: in `FORMS`.
    """

    task: str
    origin: str
    form: str


# Runs that are compared by their loss alone, at the lower rate with seed 0.
CONTROLS = (Arm("beauty", SHUFFLED, "soft"),)
# Seeds of each arm. Beauty's streams are user-centric, where every event is a goal and
# `check_user_centric_tokens` refuses a history in words: text has one goal a sample.
SEEDS = {
    **{Arm("complete_journey", origin, "soft"): 3 for origin in ORIGINS},
    **{Arm("beauty", origin, "soft"): 3 for origin in ORIGINS},
    **{Arm("beauty", origin, "soft"): 2 for origin in ALIGNED},
    **{Arm("complete_journey", origin, "text"): 1 for origin in ORIGINS},
    **{Arm("beauty", origin, form): 1 for form in ONE_GOAL for origin in ORIGINS[:2]},
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
    if arm.origin.startswith("scratch"):
        source = {"architecture": str(untrained / CONFIG_FILE)}
    if arm.origin == SHUFFLED:
        source = {"pretrained": str(work / "shuffled")}
    lora = arm.origin == "pretrained, LoRA"
    warm_up = size.steps // 10
    return validate(
        Config(
            seed=seed,
            data=_data(arm, work, size),
            tokens=_tokens(arm),
            model=ModelConfig(kind=KIND, windows=(), **source),
            tuning=TuningConfig(method="lora") if lora else TuningConfig(),
            head=_head(arm),
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


def base_origin(origin: str) -> str:
    """The origin whose rate an aligned one takes over, or itself."""
    return origin.removesuffix(", aligned")


def _head(arm: Arm) -> HeadConfig:
    if arm.task != "beauty":
        return HeadConfig()
    return HeadConfig(
        retrieval="semantic_id",
        beams=20,
        drop_seen=True,
        alignment=dict(ALIGNMENT) if arm.origin in ALIGNED else {},
    )


def _data(arm: Arm, work: Path, size: Size) -> DataConfig:
    common: dict[str, Any] = {
        "path": str(work / arm.task),
        "events": size.events,
        "batch_size": size.batch,
        "eval_batch_size": 64,
    }
    if arm.task == "beauty":
        streams = {"paradigm": "uc", "overlap": size.events // 2}
        return DataConfig(
            objective="retrieval",
            semantic_ids=str(work / "beauty_ids"),
            **({} if arm.form in ONE_GOAL else streams),
            **common,
        )
    return DataConfig(candidates=8, exclude=COUNTS, **common)


def _tokens(arm: Arm) -> TokensConfig:
    template = "Bought{history}{sid}"
    if arm.task == "complete_journey":
        template = "Household{user} bought{history} in this basket{query}||{candidate}"
    return TokensConfig(
        template=template,
        text={"history": ("title",)} if arm.form.startswith("text") else {},
        fused=True,
        user_tokens=1,
        output_scale=True,
    )

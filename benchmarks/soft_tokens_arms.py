"""Arms of `benchmarks/soft_tokens.py`: which signals are soft tokens, which are text.

All arms of a task share backbone, learning rate, batch size and order of requests; they
differ in the prompt and in when the run ends. The arms WH_SID, NO_FEAT, NO_FEAT_STRICT
and WH_SID_NO_FEAT have the names of the ablations of Token Factory (Chen et al., arXiv
2606.19635, 2026). The paper's definition of them was not available to us; `Arm.what` is
our reading."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from tokenrec.config import (
    Config,
    DataConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    TokensConfig,
    TrainConfig,
)
from tokenrec.config.load import load_config
from tokenrec.config.prompt import BAR
from tokenrec.config.validate import validate
from tokenrec.data.dataset import open_dataset
from tokenrec.data.metadata import Metadata
from tokenrec.data.schema import Schema
from tokenrec.data.semantic_id_feature import SEMANTIC_ID
from tokenrec.errors import InputError
from tokenrec.planner.describe import describe
from tokenrec.planner.flops import STEP_OVER_FORWARD

BATCH = 64
# Requests of the valid split that are evaluated, evenly spread over it.
EVALUATED = 2_000
# Log lines and checkpoints of a run.
LOGS, SAVES = 20, 4

# Features of an entity: all, those that the task writes as text, the semantic id and
# the item id, or the semantic id alone.
Choice = Literal["all", "text", "ids", "semantic_id"]
Horizon = Literal["requests", "flops of soft", "flops of text"]


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set and its objective.

    Attributes:
      config: name of a file of `configs/`; its data section names the binary tasks.
      item: the feature that is the item's id.
      text: entity -> features that are written as text; entities that are not named are
        written with all of their features.
      positive: the task whose positives are retrieved; empty for ranking.
      candidates: candidates that share a stream; in retrieval the goals of a request.
      exclude: features that no arm reads.
    """

    config: str
    item: str
    text: dict[str, tuple[str, ...]]
    positive: str
    candidates: int
    exclude: tuple[str, ...] = ()


# As in the paper, the text of an item is a semantic id of up to 8 levels, a channel and
# three dense values, or 5 tokens in retrieval. The context of a request is its query,
# so the candidate of Complete Journey has two dense values and a second channel.
TASKS: dict[str, Task] = {
    "complete_journey": Task(
        "complete_journey",
        "product_id",
        {
            "history": (
                SEMANTIC_ID,
                "store_id",
                "quantity",
                "unit_price",
                "discount_share",
            ),
            "candidate": (
                SEMANTIC_ID,
                "display_location",
                "mailer_location",
                "household_purchases",
                "product_sales",
            ),
        },
        "",
        20,
        ("title",),
    ),
    "complete_journey_retrieval": Task(
        "complete_journey",
        "product_id",
        {
            "history": (
                "product_id",
                "store_id",
                "quantity",
                "unit_price",
                "discount_share",
            )
        },
        "bought",
        10,
        ("title",),
    ),
    "kuairand_pure": Task(
        "kuairand_pure_nio",
        "video_id",
        {
            "history": (
                SEMANTIC_ID,
                "tab",
                "video_duration",
                "play_time_ms",
                "is_click",
            ),
            "candidate": (
                SEMANTIC_ID,
                "author_id",
                "video_duration",
                "rate_item_id_is_click",
                "rate_item_id_long_view",
            ),
        },
        "",
        1,
        ("user_id",),
    ),
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """A prompt and a training budget.

    Attributes:
      what: the arm in words, for the result page.
      text: entity -> features that are written as discrete tokens.
      soft: entity -> features that its soft tokens are made of. An entity that neither
        field names has soft tokens of all of its features.
      bare: the prompt is history and candidate alone, without user and query.
      capped: the history is cut from the left to one token per event.
      compressed: the older half of the events is pooled by attention in groups of 10.
      random: makers are not trained.
      horizon: the run ends after the given requests, or when it has spent the FLOPs of
        the arm "soft" or "text".
    """

    what: str
    text: Mapping[str, Choice] = dataclasses.field(default_factory=dict)
    soft: Mapping[str, Choice] = dataclasses.field(default_factory=dict)
    bare: bool = False
    capped: bool = False
    compressed: bool = False
    random: bool = False
    horizon: Horizon = "requests"


AS_TEXT: dict[str, Choice] = {
    "user": "all",
    "history": "text",
    "query": "all",
    "candidate": "text",
}
ARMS = {
    "soft": Arm(
        "one soft token per user, event, query and candidate, each made of all of its features"
    ),
    "text": Arm(
        "user, history, query and candidate written as discrete tokens, not cut",
        AS_TEXT,
    ),
    "text_budget": Arm(
        "text, its history cut from the left to as many tokens as that of soft; the rest is written whole",
        AS_TEXT,
        capped=True,
    ),
    "text_flops": Arm(
        "text that ends when it has spent the FLOPs of soft",
        AS_TEXT,
        horizon="flops of soft",
    ),
    "soft_flops": Arm(
        "soft that goes on until it has spent the FLOPs of text",
        horizon="flops of text",
    ),
    "soft_same_features": Arm(
        "soft tokens of events and candidate made of the features that text writes, and no others",
        soft={"history": "text", "candidate": "text"},
    ),
    "random": Arm(
        "soft tokens as they are made at the start; nothing before the backbone is trained",
        random=True,
    ),
    "soft_compressed": Arm(
        "soft, the older half of the events pooled by attention in groups of 10",
        compressed=True,
    ),
    "WH_SID": Arm(
        "the history as text of semantic ids alone, the rest soft",
        {"history": "semantic_id"},
    ),
    "NO_FEAT": Arm(
        "soft; events carry the ids of their items and nothing else",
        soft={"history": "ids"},
    ),
    "NO_FEAT_STRICT": Arm(
        "soft; events and candidate carry the ids of their items and nothing else, user and query are left out",
        soft={"history": "ids", "candidate": "ids"},
        bare=True,
    ),
    "WH_SID_NO_FEAT": Arm(
        "NO_FEAT_STRICT with the history as text of semantic ids",
        {"history": "semantic_id"},
        {"candidate": "ids"},
        bare=True,
    ),
}
RETRIEVAL_ARMS = (
    "soft",
    "text",
    "text_budget",
    "text_flops",
    "soft_flops",
    "soft_same_features",
    "random",
)


def task_arms(task: str) -> tuple[str, ...]:
    """Names of the arms of a task.

    Retrieval has no ablations of semantic ids, as its text does not use them.
    """
    return RETRIEVAL_ARMS if TASKS[task].positive else tuple(ARMS)


def plan_arms(
    task: str,
    arms: Sequence[str],
    data: Path,
    semantic_ids: Path | None,
    *,
    requests: int,
    events: int,
    seed: int,
) -> dict[str, Config]:
    """Plan the config of each arm, with the number of steps that its budget buys.

    Args:
      task: name of a task.
      arms: names of arms.
      data: folder of the prepared data set.
      semantic_ids: output of `tokenrec semantic-ids`; None for retrieval.
      requests: requests that an arm without a FLOP budget trains on, in whole batches.
      events: longest history.
      seed: random seed.

    Returns:
      Arm -> config.

    Raises:
      InputError: the task has no such arm, needs semantic ids, or a budget is too small
        for a step.
    """
    if unknown := [arm for arm in arms if arm not in task_arms(task)]:
        raise InputError(
            f"arms: {task} has no {', '.join(unknown)}; choose of "
            f"{', '.join(task_arms(task))}"
        )
    if not TASKS[task].positive and semantic_ids is None:
        raise InputError(
            f"semantic_ids: {task} writes items as semantic ids; give the output of "
            "tokenrec semantic-ids"
        )
    if requests < BATCH:
        raise InputError(
            f"requests={requests} is less than a batch of {BATCH}; give more"
        )
    schema = Metadata.load(data).schema
    # Configs without a horizon: of the arms, and of those whose FLOPs are a budget.
    bases = {
        arm: arm_config(task, arm, data, semantic_ids, schema, events=events, seed=seed)
        for arm in {
            *arms,
            *(ARMS[arm].horizon.removeprefix("flops of ") for arm in arms),
        }
        - {"requests"}
    }
    steps = requests // BATCH
    # Arms whose FLOPs must be counted.
    needed = {arm for arm in arms if ARMS[arm].horizon != "requests"}
    needed |= {ARMS[arm].horizon.removeprefix("flops of ") for arm in needed}
    costs = {arm: request_flops(bases[arm]) for arm in sorted(needed)}
    planned = {}
    for arm in arms:
        horizon = ARMS[arm].horizon
        bought = steps
        if horizon != "requests":
            bought = int(steps * costs[horizon.removeprefix("flops of ")] / costs[arm])
        if not bought:
            raise InputError(
                f"requests={requests} buy {arm} no step of {BATCH} requests; give more"
            )
        planned[arm] = with_horizon(bases[arm], bought)
    return planned


def arm_config(
    task: str,
    arm: str,
    data: Path,
    semantic_ids: Path | None,
    schema: Schema,
    *,
    events: int,
    seed: int,
) -> Config:
    """Build the config of an arm, without its horizon.

    Args:
      task: name of the task.
      arm: name of the arm.
      data: folder of the prepared data set.
      semantic_ids: output of `tokenrec semantic-ids`; None for retrieval.
      schema: schema of the data set as it was prepared.
      events: longest history.
      seed: random seed.

    Returns:
      The config. It excludes the features that no token of the arm is made of, so that
      no arm pays for reading what it does not use.
    """
    about, form = TASKS[task], ARMS[arm]
    base = load_config(about.config, [])
    ranking = not about.positive
    # 1. The entities of the prompt and their features.
    segments = ("history",) if form.bare else ("user", "history", "query")
    known = _entity_features(
        schema.without(f.name for f in schema.features if f.name in about.exclude),
        ranking,
    )
    present = {
        entity: known[entity]
        for entity in (*segments, *(("candidate",) if ranking else ()))
    }

    def chosen(choices: Mapping[str, Choice]) -> dict[str, tuple[str, ...]]:
        """Features of each entity; entities without features are left out."""
        return {
            entity: _features(about, entity, choice, present[entity])
            for entity, choice in choices.items()
            if present.get(entity)
        }

    # 2. What is written as text, what soft tokens are made of, and what is read at all.
    text, soft = chosen(form.text), chosen(form.soft)
    used = {
        name
        for entity, names in present.items()
        for name in text.get(entity, soft.get(entity, names))
    }
    return Config(
        seed=seed,
        data=DataConfig(
            path=str(data),
            semantic_ids=str(semantic_ids) if SEMANTIC_ID in used else "",
            exclude=tuple(f.name for f in schema.features if f.name not in used),
            tasks=base.data.tasks if ranking else {},
            objective="ranking" if ranking else "retrieval",
            positive=about.positive,
            events=events,
            candidates=about.candidates,
            batch_size=BATCH,
            eval_batch_size=BATCH,
        ),
        tokens=TokensConfig(
            prompt=(*segments, BAR, "candidate") if ranking else segments,
            text=text,
            soft=soft,
            history_cap=events if form.capped else 0,
            compression="attention" if form.compressed else "none",
            recent=events // 2 if form.compressed else 0,
            group=10,
            random_tokens=form.random,
            fused=True,
            user_tokens=1,
        ),
        model=ModelConfig(width=64, heads=2, layers=4, windows=(), dropout=0.1),
        # Not tied: text has no event token that an item vector could be added to. Full
        # softmax: with a sampled one, item vectors are still far below the popularity
        # baseline after 300 steps.
        head=HeadConfig(tied=False),
        optim=OptimConfig(learning_rate=1e-3, table_learning_rate=0.05),
        train=TrainConfig(eval_samples=EVALUATED, keep=1),
    )


def with_horizon(config: Config, steps: int) -> Config:
    """Set the number of steps, a tenth of them warm-up, and validate the config."""
    optim = dataclasses.replace(config.optim, steps=steps, warmup_steps=steps // 10)
    train = dataclasses.replace(
        config.train, log_every=max(steps // LOGS, 1), save_every=max(steps // SAVES, 1)
    )
    return validate(dataclasses.replace(config, optim=optim, train=train))


def request_flops(config: Config) -> float:
    """Model FLOPs of training on one request: three times those of its forward pass."""
    whole = open_dataset(Path(config.data.path), (), config.data.semantic_ids)
    return STEP_OVER_FORWARD * describe(config, whole.schema)["flops_per_example"]


def _entity_features(schema: Schema, ranking: bool) -> dict[str, tuple[str, ...]]:
    """Feature names of each entity of a prompt.

    Ranked items have their semantic id among them.
    """

    def names(*entities: str) -> tuple[str, ...]:
        return tuple(f.name for f in schema.features if f.entity in entities)

    codes = (SEMANTIC_ID,) if ranking else ()
    return {
        "user": names("user"),
        "history": (*names("item", "context", "action"), *codes),
        "query": names("context"),
        "candidate": (*names("item"), *codes),
    }


def _features(
    task: Task, entity: str, choice: Choice, known: tuple[str, ...]
) -> tuple[str, ...]:
    if choice == "all":
        return known
    if choice == "text":
        return task.text[entity]
    return (SEMANTIC_ID,) if choice == "semantic_id" else (SEMANTIC_ID, task.item)

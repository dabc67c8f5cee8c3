"""Alignment tasks: templates that tie the texts of items to their semantic ids.

    {"The id of {title} is {sid}": 1.0, "{sid} is the id of {title}": 0.5}

What a template ends with is learned; what stands before it is the question. So the
first asks for the semantic id of an item by its text, the second for the text by the
id. Both are tasks of LC-Rec (Zheng et al., *Adapting Large Language Models by
Integrating Collaborative Semantics for Recommendation*, ICDE 2024), mixed with the
next semantic id by weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tokenrec.config.backbones import BACKBONES, is_decoder
from tokenrec.config.config import Config
from tokenrec.config.template import TEXT, chat_turn, parse_template
from tokenrec.errors import InputError

FIELD = "head.alignment"
TITLE, SID = "title", "sid"


class AlignmentTask(NamedTuple):
    """A template of `head.alignment`: text, question, text, answer.

    Attributes:
      name: `title_to_sid` or `sid_to_title`, and a number behind it for the second
        template of a kind and those that follow, in the order of the alphabet.
      template: the template.
      weight: weight of its loss.
      answer: slot that is learned, `TITLE` or `SID`; the question is the other one.
      before: text in front of the question.
      between: text between question and answer.
    """

    name: str
    template: str
    weight: float
    answer: str
    before: str
    between: str


def alignment_tasks(config: Config) -> tuple[AlignmentTask, ...]:
    """Parse the templates of `head.alignment`.

    With `tokens.chat` what stands before the answer is the turn of the user.

    Raises:
      InputError: a slot is unknown, or a template does not hold each of the two once,
        the answer at its end.
    """
    tasks: list[AlignmentTask] = []
    # In an order of their own: a run may be resumed with the same templates in another.
    for template, weight in sorted(config.head.alignment.items()):
        task = _parse(config, template, weight)
        same = sum(other.answer == task.answer for other in tasks)
        tasks.append(task._replace(name=f"{task.name}_{same + 1}") if same else task)
    return tuple(tasks)


def alignment_problems(config: Config) -> Iterator[str]:
    """Yield what is wrong with `head.alignment`."""
    head, data = config.head, config.data
    if not head.alignment:
        return
    if not is_decoder(config.model):
        able = [kind for kind, spec in BACKBONES.items() if spec.decoder]
        yield (
            f"{FIELD} with model.kind='{config.model.kind}', which reads and writes no "
            f"words; use {{}}, or one of model.kind={able}"
        )
        return
    if data.objective != "retrieval" or head.retrieval != "semantic_id":
        yield (
            f"{FIELD} with data.objective='{data.objective}' and "
            f"head.retrieval='{head.retrieval}', which generate no semantic id; use "
            "{}, or 'retrieval' and 'semantic_id'"
        )
    for template, weight in head.alignment.items():
        try:
            _parse(config, template, weight)
        except InputError as error:
            yield str(error)


def _parse(config: Config, template: str, weight: float) -> AlignmentTask:
    words = list(parse_template(template, FIELD, (TITLE, SID)))
    slots = [word.strip("{}") for word in words if not word.startswith(TEXT)]
    if sorted(slots) != [SID, TITLE]:
        raise InputError(
            f"{FIELD}: {template!r} must hold '{{title}}' and '{{sid}}' once each"
        )
    if words[-1].startswith(TEXT):
        behind = words[-1].removeprefix(TEXT)
        raise InputError(
            f"{FIELD}: {behind!r} stands behind '{{{slots[-1]}}}' in {template!r}, "
            "whose end is what is learned; move the slot to the end"
        )
    question = words.index(f"{{{slots[0]}}}")
    before, between = (
        "".join(word.removeprefix(TEXT) for word in part)
        for part in (words[:question], words[question + 1 : -1])
    )
    if config.tokens.chat:
        begin, end = chat_turn(config)
        before, between = begin + before, between + end
    name = "_to_".join(slots)
    return AlignmentTask(name, template, weight, slots[-1], before, between)

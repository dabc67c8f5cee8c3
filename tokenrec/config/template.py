"""Templates: the prompt as one text with slots, in place of a list of segments.

    Bought so far: {history} Is {title} {candidate} next?

`template_words` translates `tokens.template` to the words that `tokens.prompt` would
have, so that both have one meaning (prompt.py):

    text:Bought so far:    history    ||    text: Is    title    text:     candidate ..

A language model reads a text letter by letter, so its literal texts keep their blanks.
A tokenizer that is trained on the data puts a space before every text; for other kinds
of models blanks at the ends of a literal text are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tokenrec.config.backbones import is_decoder
from tokenrec.config.config import Config
from tokenrec.errors import InputError, suggest
from tokenrec.language.families import FAMILIES

BAR = "||"
TEXT = "text:"
# The place of the answer is no segment: the layout puts the codes behind the prefix.
ANSWER = "sid"
SLOTS = ("user", "sep", "history", "query", "title", "candidate", ANSWER)

_SLOTS_OF_CANDIDATES = ("title", "candidate")
# A brace of the text, the bar, a slot, or a brace without its partner.
_PIECE = re.compile(r"\{\{|\}\}|\|\||\{(?P<slot>[^{}]*)\}|[{}]")
# Characters around a piece in messages.
_AROUND = 12


def template_words(config: Config) -> tuple[str, ...]:
    """Translate `tokens.template` to the words of `tokens.prompt`.

    Raises:
      InputError: a slot is unknown, a brace has no partner, the slot of the answer is
        not at the end of a prompt that generates, or the kind of model has no chat
        format.
    """
    tokens = config.tokens
    words = list(parse_template(tokens.template, "tokens.template", SLOTS))
    if f"{{{ANSWER}}}" in words:
        _check_answer(config, words)
        words.pop()
    if BAR not in words:
        _insert_bar(words)
    if tokens.chat:
        before, behind = chat_turn(config)
        words = [TEXT + before, *words, TEXT + behind]
    if not is_decoder(config.model):
        words = [
            TEXT + word.removeprefix(TEXT).strip() if word.startswith(TEXT) else word
            for word in words
        ]
    # A slot in braces is the word without them.
    return tuple(
        word if word.startswith(TEXT) else word.strip("{}")
        for word in words
        if word != TEXT
    )


def chat_turn(config: Config) -> tuple[str, str]:
    """Text before and behind what the user says, in the chat format of the model.

    Raises:
      InputError: the kind of model has no chat format.
    """
    kind = config.model.kind
    if not is_decoder(config.model):
        raise InputError(
            f"tokens.chat=True with model.kind='{kind}', which is no language model "
            f"and has no chat format; use False, or one of {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    before, behind = family.turn
    return family.begin + before, behind


def parse_template(template: str, field: str, slots: tuple[str, ...]) -> Iterator[str]:
    """Yield the pieces of a template: `text:...`, slots in their braces, and `||`.

    Args:
      template: the template.
      field: config field that it is the value of, for messages.
      slots: names that a slot may have.

    Raises:
      InputError: a slot is unknown, or a brace has no partner.
    """
    text, place = "", 0
    for match in _PIECE.finditer(template):
        text += template[place : match.start()]
        place = match.end()
        piece = match.group()
        if piece in ("{{", "}}"):
            text += piece[0]
            continue
        if piece != BAR:
            _check_slot(template, match, field, slots)
        if text:
            yield TEXT + text
        text = ""
        yield piece
    text += template[place:]
    if text:
        yield TEXT + text


def _check_slot(
    template: str, match: re.Match[str], field: str, slots: tuple[str, ...]
) -> None:
    slot = match["slot"]
    if slot is None:
        around = template[max(match.start() - _AROUND, 0) : match.end() + _AROUND]
        raise InputError(
            f"{field}: '{match.group()}' in {around!r} has no partner; write "
            f"a slot as '{{{slots[0]}}}', and double a brace that is text"
        )
    if slot not in slots:
        raise InputError(
            f"{field}: '{match.group()}' is not a slot{suggest(slot, slots)}; "
            "double the braces if they are text"
        )


def _check_answer(config: Config, words: list[str]) -> None:
    """Check that a semantic id is generated, at the end of the template."""
    answer, data = f"{{{ANSWER}}}", config.data
    if data.objective != "retrieval" or config.head.retrieval != "semantic_id":
        raise InputError(
            f"tokens.template holds '{answer}' with data.objective='{data.objective}' "
            f"and head.retrieval='{config.head.retrieval}', which generate no semantic "
            "id; leave it out, or use 'retrieval' and 'semantic_id'"
        )
    if words.count(answer) > 1:
        raise InputError(
            f"tokens.template holds '{answer}' {words.count(answer)} times; keep one"
        )
    if words[-1] != answer:
        behind = words[words.index(answer) + 1].removeprefix(TEXT)
        raise InputError(
            f"tokens.template: {behind!r} stands behind '{answer}', where the answer is "
            f"generated; move '{answer}' to the end"
        )


def _insert_bar(words: list[str]) -> None:
    """Put `||` before the text that leads to the first slot of a candidate."""
    slots = [f"{{{slot}}}" for slot in _SLOTS_OF_CANDIDATES]
    first = next((n for n, word in enumerate(words) if word in slots), None)
    if first is None:
        return
    leads = first > 0 and words[first - 1].startswith(TEXT)
    words.insert(first - 1 if leads else first, BAR)

"""`tokens.template` and `tokens.chat` are read as the segments of a prompt."""

from __future__ import annotations

from typing import Any

import pytest

from tokenrec.config import (
    Config,
    DataConfig,
    DecoderConfig,
    HeadConfig,
    ModelConfig,
    TokensConfig,
)
from tokenrec.config.prompt import Segment, parse_prompt
from tokenrec.config.validate import validate
from tokenrec.errors import InputError

RANKING = "Bought so far: {history} Is {title} {candidate} next?"
GENERATION = "Bought so far: {history}. Next: {sid}"


def config(
    template: str = RANKING,
    kind: str = "gemma3",
    objective: str = "ranking",
    retrieval: str = "next_item",
    paradigm: str = "nio",
    **tokens: Any,
) -> Config:
    decoder = kind in ("gemma3", "qwen3", "llama3")
    return Config(
        data=DataConfig(
            path="-",
            objective=objective,
            paradigm=paradigm,
            semantic_ids="ids" if retrieval == "semantic_id" else "",
            overlap=1 if paradigm == "uc" else 0,
        ),
        tokens=TokensConfig(
            template=template, fused=objective == "retrieval" or decoder, **tokens
        ),
        model=ModelConfig(
            kind=kind,
            windows=(),
            decoder=DecoderConfig(vocabulary=300, kv_heads=2, head_width=16)
            if decoder
            else DecoderConfig(),
        ),
        head=HeadConfig(retrieval=retrieval, beams=50, top_k=50),
    )


def generation(template: str = GENERATION, **tokens: Any) -> Config:
    return config(template, objective="retrieval", retrieval="semantic_id", **tokens)


def text(words: str, own: bool = False) -> Segment:
    return Segment("text", own, words)


def test_a_template_becomes_segments_with_its_blanks() -> None:
    assert parse_prompt(config()) == (
        text("Bought so far: "),
        Segment("history"),
        text(" Is ", own=True),
        Segment("title", own=True),
        text(" ", own=True),
        Segment("candidate", own=True),
        text(" next?", own=True),
    )


def test_a_template_equals_the_prompt_of_its_words() -> None:
    prompt = ("text:Seen: ", "history", "sep", "query", "||", "text: Is ", "candidate")
    written = config("", prompt=prompt)
    assert parse_prompt(written) == parse_prompt(
        config("Seen: {history}{sep}{query} Is {candidate}")
    )


def test_blanks_at_the_ends_of_texts_are_for_language_models_alone() -> None:
    template = "Seen:\n{user} {history} Is {title} {candidate}"
    assert parse_prompt(config(template, kind="tokenformer")) == (
        text("Seen:"),
        Segment("user"),
        Segment("history"),
        text("Is", own=True),
        Segment("title", own=True),
        Segment("candidate", own=True),
    )


@pytest.mark.parametrize(
    ("template", "shared"),
    [
        ("{history} Is {candidate}?", 1),
        ("{history}{candidate}", 1),
        ("{history} That was all.||Is {title} {candidate}?", 2),
        ("{history}|| Is {candidate}?", 1),
        ("{user} and {history}{title} of {candidate}", 3),
    ],
)
def test_the_bar_stands_before_the_words_of_a_candidate(
    template: str, shared: int
) -> None:
    segments = parse_prompt(config(template))
    assert [s.own for s in segments] == [False] * shared + [True] * (
        len(segments) - shared
    )


def test_doubled_braces_are_braces_of_the_text() -> None:
    segments = parse_prompt(config("{{{history}}} {{sid}} {candidate}"))
    assert [s.text for s in segments] == ["{", "", "} {sid} ", ""]


def test_the_answer_of_generation_is_no_segment() -> None:
    assert parse_prompt(generation()) == (
        text("Bought so far: "),
        Segment("history"),
        text(". Next: "),
    )


@pytest.mark.parametrize(
    ("kind", "before", "behind"),
    [
        (
            "gemma3",
            "<bos><start_of_turn>user\n",
            "<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            "qwen3",
            "<|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_the_chat_format_is_one_text_with_the_words_beside_it(
    kind: str, before: str, behind: str
) -> None:
    first, _, *_, last = parse_prompt(config(kind=kind, chat=True))
    assert first == text(before + "Bought so far: ")
    assert last == text(" next?" + behind, own=True)
    chat = generation(chat=True)
    chat.model.kind = kind
    assert parse_prompt(chat) == (
        text(before + "Bought so far: "),
        Segment("history"),
        text(". Next: " + behind),
    )
    bare = parse_prompt(config("{history}{candidate}", kind=kind, chat=True))
    assert bare[0] == text(before)
    assert bare[-1] == text(behind, own=True)


def test_texts_of_a_prompt_side_by_side_are_one_for_a_language_model() -> None:
    prompt = ("text:Seen", "text: before:", "history", "||", "text: ", "candidate")
    first, *_ = parse_prompt(config("", prompt=prompt))
    assert first == text("Seen before:")
    apart = parse_prompt(config("", kind="tokenformer", prompt=prompt))
    assert [s.text for s in apart][:2] == ["Seen", " before:"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            config("{history} {titel} {candidate}"),
            r"tokens\.template: '\{titel\}' is not a slot; did you mean 'title'\?; "
            "double the braces",
        ),
        (config("{history} {} {candidate}"), r"'\{\}' is not a slot; known: .*user"),
        (
            config("{history} {candidate} {candidate}"),
            r"tokens\.template='.*' holds 'candidate' 2 times; keep one",
        ),
        (
            config("So far {history and {candidate}"),
            r"'\{' in 'So far \{history and ' has no partner.*double a brace",
        ),
        (config("{history} a} {candidate}"), r"'\}' in '.*' has no partner"),
        (
            config("{history}||{title}||{candidate}"),
            r"template='.*' holds '\|\|' twice",
        ),
        (config("Is {candidate} next?"), r"tokens\.template='.*' holds no 'history'"),
        (config("{history} and {title}"), "holds no 'candidate'; add it"),
        (
            config("{history} Is {candidate} {title}"),
            "must end with 'candidate' or with text",
        ),
        (
            config("{history} Is {candidate} next?", kind="tokenformer"),
            r"tokens\.template='.*' must end with 'candidate', whose last token",
        ),
        (config("{candidate} after {history}?"), "move the others left"),
        (config(prompt=("history", "||", "candidate")), "keep one of them"),
        (config("", chat=True), r"tokens\.chat=True with tokens\.template=''"),
        (
            config("{history} {candidate}", kind="tokenformer", chat=True),
            r"tokens\.chat=True with model\.kind='tokenformer'.*gemma3, qwen3, llama3",
        ),
        (
            config("{history} {candidate}", kind="din"),
            r"tokens\.template='.*' with model\.kind='din'.*leave it empty",
        ),
        (
            config("{history}{sid}", objective="retrieval"),
            r"holds '\{sid\}' with .*head\.retrieval='next_item'.*leave it out",
        ),
        (config("{history} {sid}"), r"holds '\{sid\}' with data\.objective='ranking'"),
        (
            generation("{history} {sid} please"),
            r"tokens\.template: ' please' stands behind '\{sid\}'.*to the end",
        ),
        (generation("{history}{sid}{sid}"), r"holds '\{sid\}' 2 times; keep one"),
        (
            generation("{history} Is {candidate}? {sid}"),
            r"tokens\.template='.*there are no candidates.*and the slots of candidates",
        ),
        (
            config("Seen: {history}", paradigm="uc", objective="retrieval", chat=True),
            r"tokens\.chat=True with data\.paradigm='uc'.*use False",
        ),
        (
            config("{query}{history}", paradigm="uc", objective="retrieval"),
            r"tokens\.template='.*' holds 'query' with data\.paradigm='uc'",
        ),
    ],
)
def test_a_wrong_template_is_named_with_its_remedy(wrong: Config, words: str) -> None:
    with pytest.raises(InputError, match=words):
        validate(wrong)


@pytest.mark.parametrize(
    "right",
    [
        config(),
        config(chat=True),
        config("{user} {history} Is {candidate}", kind="tokenformer"),
        generation(),
        generation(chat=True),
        config("Seen: {history}", objective="retrieval", paradigm="uc"),
    ],
)
def test_a_right_template_is_valid(right: Config) -> None:
    assert validate(right).tokens == right.tokens

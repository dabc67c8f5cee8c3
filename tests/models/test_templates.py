"""Templates in a stream: ids of the literal texts, and the token that is read."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.data.memory_source import MemorySource
from tests.data.model_tokenizer import CONTROL, byte_level, write_model
from tests.worlds import one_device, place, random_batch, tiny
from tokenrec.config import Config, DecoderConfig
from tokenrec.config.prompt import parse_prompt
from tokenrec.data.batch import Batch
from tokenrec.data.dataset import open_dataset
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import FIRST_KNOWN, Feature, Schema, Task
from tokenrec.data.tokenizer import TOKENIZER_FILE, encode_literal, load_tokenizer
from tokenrec.errors import InputError
from tokenrec.language.families import FAMILIES
from tokenrec.language.tokenizer_checks import control_tokens
from tokenrec.models.stream_layout import stream_layout
from tokenrec.state import build_model, init_state, prompt_literals
from tokenrec.step import train_step
from tokenrec.tokens.layout import ROLES

WORDS = 3
SCHEMA = Schema(
    (
        Feature("title", "text", "item", length=WORDS, codes=256),
        Feature("tab", "categorical", "context"),
        Feature("clicked", "categorical", "action"),
    ),
    (Task("click"),),
)
TEMPLATE = "Bought so far: {history} Is {title} {candidate} next?"


@pytest.fixture(scope="module")
def model_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in the tokens of a small model with Gemma's control tokens."""
    folder = tmp_path_factory.mktemp("data")
    prepare(source(), folder / "set", tokenizer=write_model(folder / "model"))
    return folder / "set"


def source() -> MemorySource:
    rows = {"user_id": [1, 1], "item_id": [7, 8], "time_ms": [1, 2]}
    return MemorySource(
        rows,
        {"user_id": [1]},
        {"item_id": [7, 8], "title": ["green tea", "tea"]},
        SCHEMA,
    )


def config(data: Path, kind: str = "gemma3", candidates: int = 2, **tokens) -> Config:
    tokens = {"template": TEMPLATE} | tokens
    out = tiny(
        fused=True,
        tokens=tokens,
        model={"windows": ()},
        events=4,
        candidates=candidates,
    )
    out.data.path = str(data)
    out.model.kind = kind
    if kind != "tokenformer":
        out.model.layers, out.model.ffn_width = 1, 24
        out.model.decoder = DecoderConfig(vocabulary=300, kv_heads=1, head_width=8)
    return out


def clicks(config: Config, schema: Schema) -> Batch:
    """A batch of the one task, whose ids are in the tables of this data set."""
    batch = random_batch(config, schema=schema)
    batch = jax.tree.map(
        lambda x: np.minimum(x, 1) if x.dtype == np.int32 else x, batch
    )
    return batch._replace(labels=batch.labels[..., :1])


def library_ids(data: Path, text: str) -> tuple[int, ...]:
    """Tokens of a text by the library alone, as ids of the data set."""
    tokenizer = Tokenizer.from_file(str(data / TOKENIZER_FILE))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    return tuple(token + FIRST_KNOWN for token in tokens)


def test_each_text_is_encoded_once_with_its_blanks(model_data: Path) -> None:
    assert prompt_literals(config(model_data)) == tuple(
        library_ids(model_data, text)
        for text in ("Bought so far: ", " Is ", " ", " next?")
    )
    # A blank is a token of its own or a part of one: texts without it differ.
    assert library_ids(model_data, " Is ") != library_ids(model_data, "Is")


def test_control_tokens_of_the_chat_format_are_single_tokens(model_data: Path) -> None:
    bos, start, end = (
        FIRST_KNOWN + byte_level().token_to_id(token) for token in CONTROL
    )
    first, *_, last = prompt_literals(config(model_data, chat=True))
    assert first[:2] == (bos, start)
    user = library_ids(model_data, "user\nBought so far: ")
    assert first[2:] == user
    next_, newline, model = (
        library_ids(model_data, text) for text in (" next?", "\n", "model\n")
    )
    assert last == (*next_, end, *newline, start, *model)


def test_the_last_word_behind_a_candidate_is_read(model_data: Path) -> None:
    chat = config(model_data, chat=True)
    data, literals = open_dataset(model_data), prompt_literals(chat)
    layout = stream_layout(chat, data.schema, 4, literals)
    before, leads, blank, behind = map(len, literals)
    own = [
        *["text"] * leads,
        *["title"] * WORDS,
        *["text"] * blank,
        "target",
        *["text"] * behind,
    ]
    names = [ROLES[role] for role in layout.roles]
    assert names == ["text"] * before + ["event"] * 4 + own * 2
    assert layout.readout.tolist() == [
        before + 4 + len(own) * (1 + n) - 1 for n in range(2)
    ]
    # Candidates do not see each other, and each stands right behind the history.
    assert np.array_equal(
        layout.index[before + 4 :].reshape(2, -1),
        np.tile(np.arange(before + 4, before + 4 + len(own)), (2, 1)),
    )


def test_a_generated_id_continues_the_words_of_the_answer(model_data: Path) -> None:
    chat = config(
        model_data, template="Seen: {history} Next: {sid}", chat=True, candidates=1
    )
    chat.data.objective, chat.head.retrieval = "retrieval", "semantic_id"
    literals = prompt_literals(chat)
    data = open_dataset(model_data)
    layout = stream_layout(chat, data.schema, 4, literals, codes=2)
    names = [ROLES[role] for role in layout.roles]
    before, behind = map(len, literals)
    assert names == [
        *["text"] * before,
        *["event"] * 4,
        *["text"] * behind,
        "code",
        "code",
    ]
    assert layout.readout.tolist() == [len(names) - 3 + n for n in range(3)]


def test_a_tokenizer_that_does_not_know_a_control_token_is_refused(
    tmp_path: Path,
) -> None:
    prepare(source(), tmp_path / "set")
    assert len(prompt_literals(config(tmp_path / "set"))) == 4
    with pytest.raises(
        InputError,
        match=r"set': its tokenizer makes \d+ tokens of '<bos>', which is one token of "
        r"model\.kind='gemma3'; prepare the data with --tokenizer of the model",
    ):
        build_model(
            config(tmp_path / "set", chat=True),
            open_dataset(tmp_path / "set").schema,
            ("click",),
        )


def test_a_token_that_the_model_has_no_word_for_is_refused(model_data: Path) -> None:
    small = config(model_data, template="{history} next {candidate}")
    small.model.decoder.vocabulary = 200
    with pytest.raises(
        InputError,
        match=r"has a token 2\d\d for ' next ', and the model has "
        r"model\.decoder\.vocabulary=200 words; prepare the data with --tokenizer",
    ):
        prompt_literals(small)


def test_a_language_model_learns_from_a_chat(model_data: Path) -> None:
    chat = config(model_data, chat=True)
    chat.optim.warmup_steps, chat.optim.weight_decay = 0, 0.0
    schema = open_dataset(model_data).schema
    with jax.set_mesh(one_device()):
        model = build_model(chat, schema, ("click",))
        before = init_state(model, 0)
        batch = place(clicks(chat, schema), one_device())
        after, metrics = jax.jit(train_step, static_argnums=0)(model, before, batch)
    assert np.isfinite(metrics.loss)
    moved = np.abs(after.params["words/inputs"] - before.params["words/inputs"]) > 0
    learned = {int(row) + FIRST_KNOWN for row in np.flatnonzero(moved.any(axis=1))}
    read = {word for text in model.literals for word in text}
    # Ids of the titles are 0 and 1, which are read as word 0.
    assert read <= learned <= read | {FIRST_KNOWN}


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_the_control_tokens_of_each_family_are_asked_for(
    tmp_path: Path, kind: str
) -> None:
    known = control_tokens(FAMILIES[kind])
    # The last one is missing from the second tokenizer.
    for name, tokens in (("all", known), ("fewer", known[:-1])):
        model = write_model(tmp_path / kind / name, byte_level(tokens))
        prepare(source(), tmp_path / name, tokenizer=model)
    literals = prompt_literals(config(tmp_path / "all", kind, chat=True))
    found = {word for text in literals for word in text}
    tokenizer = load_tokenizer(tmp_path / "all")
    assert all(encode_literal(tokenizer, token)[0] in found for token in known)
    with pytest.raises(
        InputError, match=f"tokens of '{known[-1]}'".replace("|", r"\|")
    ):
        prompt_literals(config(tmp_path / "fewer", kind, chat=True))


def test_another_kind_of_model_gets_the_words_of_its_prompt(tmp_path: Path) -> None:
    prepare(source(), tmp_path / "set")
    template = "Seen: {history} {query} Is {title} {candidate}"
    prompt = ("text:Seen:", "history", "query", "||", "text:Is", "title", "candidate")
    written = config(tmp_path / "set", "tokenformer", template="", prompt=prompt)
    as_text = config(tmp_path / "set", "tokenformer", template=template)
    assert parse_prompt(as_text) == parse_prompt(written)
    assert prompt_literals(as_text) == prompt_literals(written)
    assert prompt_literals(as_text)[1] == library_ids(tmp_path / "set", "is")

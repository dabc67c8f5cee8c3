"""The reference computes what transformers computes on PyTorch (extra `peers`)."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file

from tests.language import reference
from tests.language.hf_models import (
    CONFIGS,
    WIDTH,
    random_text,
    save_model,
    write_model,
)
from tests.language.reference import relative_error

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# One text without padding, one longer than the window of 5, one shorter.
TOKENS, MASK = random_text((24, 9, 3))
IDS, SEEN = torch.tensor(TOKENS, dtype=torch.long), torch.tensor(MASK)
# Words that have a next one.
LIVE = MASK[:, :-1]


def peer_logits(model: torch.nn.Module, **inputs: torch.Tensor) -> np.ndarray:
    """Scores of all real words by a PyTorch model, `[words, V]`."""
    with torch.no_grad():
        logits = model(attention_mask=SEEN.long(), **inputs).logits
    return logits.float().numpy()[MASK]


def read(folder: Path) -> tuple[dict, dict[str, jax.Array]]:
    """`config.json` and the tensors of a checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_and_gradients_are_those_of_transformers(
    name: str, tmp_path: Path
) -> None:
    peer = save_model(tmp_path, name)
    config, tensors = read(tmp_path)

    def loss(tensors: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = reference.logits(tensors, config, MASK, tokens=TOKENS)
        chances = jax.nn.log_softmax(logits[:, :-1])
        words = jnp.take_along_axis(chances, TOKENS[:, 1:, None], 2)[..., 0]
        return -jnp.where(LIVE, words, 0).sum() / LIVE.sum(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(tensors)
    theirs = peer(input_ids=IDS, attention_mask=SEEN.long()).logits
    peer_loss = torch.nn.functional.cross_entropy(
        theirs[:, :-1][torch.tensor(LIVE)], IDS[:, 1:][torch.tensor(LIVE)]
    )
    peer_loss.backward()
    peer_gradients = {
        tensor: weight.grad.numpy() for tensor, weight in peer.named_parameters()
    }
    assert set(gradients) == set(peer_gradients)
    # Measured: at most 2.2e-6 of each.
    assert relative_error(logits[MASK], theirs.detach().numpy()[MASK]) < 1e-5
    for tensor, gradient in gradients.items():
        assert relative_error(gradient, peer_gradients[tensor]) < 1e-5, tensor


@pytest.mark.parametrize("name", ["gemma3_linear", "qwen3_windows", "llama3"])
def test_transformers_reads_the_folders_that_are_written_without_it(
    name: str, tmp_path: Path
) -> None:
    write_model(tmp_path, name)
    config, tensors = read(tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = jax.jit(lambda t: reference.logits(t, config, MASK, tokens=TOKENS))(tensors)
    theirs = peer_logits(peer.eval(), input_ids=IDS)
    # Measured: at most 1.0e-6, with the attention that transformers takes by default.
    assert relative_error(ours[MASK], theirs) < 1e-5


@pytest.mark.parametrize("name", ["gemma3", "qwen3_windows", "llama3"])
def test_embeddings_take_the_place_of_words(name: str, tmp_path: Path) -> None:
    peer = save_model(tmp_path, name)
    config, tensors = read(tmp_path)
    draw = np.random.default_rng(2)
    soft = draw.normal(size=(*MASK.shape, WIDTH)).astype(np.float32)
    ours = jax.jit(lambda t: reference.logits(t, config, MASK, embeddings=soft))
    theirs = peer_logits(peer, inputs_embeds=torch.tensor(soft))
    # Measured: at most 6.4e-7.
    assert relative_error(ours(tensors)[MASK], theirs) < 1e-5


@pytest.mark.parametrize("name", ["gemma3", "qwen3_windows", "llama3"])
def test_a_cache_of_keys_and_values_changes_nothing(name: str, tmp_path: Path) -> None:
    peer = save_model(tmp_path, name)
    config, tensors = read(tmp_path)
    ours = jax.jit(lambda t: reference.logits(t, config, MASK, tokens=TOKENS))(tensors)
    seen = SEEN.long()
    with torch.no_grad():
        begun = peer(input_ids=IDS[:, :17], attention_mask=seen[:, :17], use_cache=True)
        rest = peer(
            input_ids=IDS[:, 17:],
            attention_mask=seen,
            cache=begun.cache,
        )
    live = MASK[:, 17:]
    # Measured: at most 9.2e-7.
    assert relative_error(ours[:, 17:][live], rest.logits.numpy()[live]) < 1e-5


@pytest.mark.parametrize("name", ["gemma3", "qwen3", "llama3"])
def test_transformers_in_bfloat16_is_off_by_its_rounding(
    name: str, tmp_path: Path
) -> None:
    save_model(tmp_path, name, "bfloat16")
    config, tensors = read(tmp_path)
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    ours = jax.jit(lambda t: reference.logits(t, config, MASK, tokens=TOKENS))(tensors)
    theirs = peer_logits(peer.eval(), input_ids=IDS)
    # Measured: 1.5e-2, 1.9e-2, 1.2e-2, by the worst of all scores.
    assert 1e-4 < relative_error(ours[MASK], theirs) < 3e-2

"""The small language model of `benchmarks/language_model_transfer.py`.

It has the shape of Qwen 3 and is trained by next-word cross-entropy with tokenrec's own
`Decoder` and `WordTable`, in a plain loop: what is pretrained here is what the runs
read. The result is a folder in the format of Hugging Face.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tokenrec.config import Config, ModelConfig
from tokenrec.data.schema import FIRST_KNOWN
from tokenrec.data.tokenizer import TOKENIZER_FILE
from tokenrec.language.architecture import CONFIG_FILE, with_architecture
from tokenrec.language.export import write_checkpoint
from tokenrec.language.weight_names import parameter_count
from tokenrec.models.backbones.decoder import Decoder
from tokenrec.models.words import WordTable
from tokenrec.runtime.files import write_json
from tokenrec.sharding import make_mesh
from tokenrec.tokens.layout import Layout

KIND = "qwen3"
BATCH = 16
LENGTH = 128
RATE = 2e-3
# Of the pretrained folder, beside the files of the model.
REPORT = "pretraining.json"


def architecture(words: int) -> dict[str, Any]:
    """A `config.json` of the shape of Qwen 3, with `words` rows of the embedding."""
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": words,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000,
        "rope_scaling": None,
        "use_sliding_window": False,
        "sliding_window": None,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
        "torch_dtype": "float32",
    }


class LanguageModel(nnx.Module):
    """Words and layers, under the names that they have in a recommender."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.words = WordTable(config, scored=True, rngs=rngs)
        self.backbone = Decoder(config, rngs=rngs)
        # Tied vectors are read and score; with unit size their scores start large.
        self.words.inputs[...] = 0.02 * np.sqrt(config.width) * self.words.inputs[...]

    def losses(self, ids: jax.Array) -> jax.Array:
        """Cross-entropy of each next word of `ids: [B, S]`, `[B, S - 1]`."""
        x = self.words(ids[:, :-1] + FIRST_KNOWN, jnp.float32)
        no_events = jnp.zeros((len(x), 0), bool)
        h = self.backbone(x, text_layout(x.shape[1]), no_events, None, None)
        chances = jax.nn.log_softmax(self.words.logits(h))
        return -jnp.take_along_axis(chances, ids[:, 1:, None], axis=-1)[..., 0]


def text_layout(length: int) -> Layout:
    """A stream of words alone, each of which is read out."""
    place = np.arange(length)
    zeros = np.zeros(length, np.int32)
    return Layout(
        roles=zeros,
        index=place,
        reach=place,
        candidate=zeros - 1,
        event=zeros - 1,
        offset=place,
        static=zeros.astype(bool),
        readout=place,
        events=0,
        candidates=0,
        discard=False,
    )


def model_config(file: Path) -> Config:
    """A config with the sizes of a `config.json`."""
    config = Config()
    config.model.kind, config.model.architecture = KIND, str(file)
    config.model.windows = ()
    filled, problems = with_architecture(config)
    assert not problems, problems
    return filled


def pretrain(
    out: Path,
    untrained: Path,
    rows: np.ndarray,
    held_out: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Train a language model from random weights.

    Args:
      out: the folder to write; it must not exist.
      untrained: folder of its `config.json` and `tokenizer.json`.
      rows: `[n, length] int32`, packed texts, each read once.
      held_out: kind of text -> rows that measure the perplexity.

    Returns:
      Sizes, rates, seconds, and the perplexity by kind of text before and after.
    """
    config = model_config(untrained / CONFIG_FILE)
    steps = len(rows) // BATCH
    with jax.set_mesh(make_mesh(config.mesh, jax.devices()[:1])):
        graph, weights = nnx.split(LanguageModel(config.model, rngs=nnx.Rngs(0)))
        peak = optax.schedules.warmup_cosine_decay_schedule(
            0.0, RATE, max(steps // 20, 1), max(steps, 2), 0.1 * RATE
        )
        optimizer = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(peak, 0.9, 0.99, weight_decay=0.01),
        )
        moments = optimizer.init(weights)

        def mean_loss(weights: Any, ids: jax.Array) -> jax.Array:
            return jnp.mean(nnx.merge(graph, weights).losses(ids))

        @jax.jit
        def step(
            weights: Any, moments: Any, ids: jax.Array
        ) -> tuple[Any, Any, jax.Array]:
            loss, gradients = jax.value_and_grad(mean_loss)(weights, ids)
            changes, moments = optimizer.update(gradients, moments, weights)
            return optax.apply_updates(weights, changes), moments, loss

        measure = jax.jit(mean_loss)
        before = _perplexities(measure, weights, held_out)
        print(f"perplexity {before}", flush=True)
        start = time.perf_counter()
        for number in range(steps):
            ids = jnp.asarray(rows[number * BATCH : (number + 1) * BATCH])
            weights, moments, loss = step(weights, moments, ids)
            if number % 20 == 0:
                passed = time.perf_counter() - start
                print(f"step {number} loss {loss:.3f} {passed:.0f} s", flush=True)
        seconds = time.perf_counter() - start
        after = _perplexities(measure, weights, held_out)
        flat = {
            "/".join(map(str, path)): np.asarray(leaf.get_value())
            for path, leaf in nnx.to_flat_state(weights)
        }
    report = {
        "weights": parameter_count(config.model),
        "words read": steps * BATCH * rows.shape[1],
        "batch": BATCH,
        "learning rate": RATE,
        "seconds": seconds,
        "perplexity before": before,
        "perplexity after": after,
    }

    def add_files(partial: Path) -> None:
        shutil.copyfile(untrained / TOKENIZER_FILE, partial / TOKENIZER_FILE)
        write_json(partial / REPORT, report)

    write_checkpoint(out, config, flat, add_files=add_files)
    return report


def _perplexities(
    measure: Callable[[Any, jax.Array], jax.Array],
    weights: Any,
    held_out: Mapping[str, np.ndarray],
) -> dict[str, float]:
    found = {}
    for kind, rows in held_out.items():
        # Whole batches, so that one program measures them all.
        size = min(BATCH, len(rows))
        starts = range(0, len(rows) - size + 1, size)
        losses = [measure(weights, jnp.asarray(rows[n : n + size])) for n in starts]
        found[kind] = float(np.exp(np.mean(losses)))
    return found

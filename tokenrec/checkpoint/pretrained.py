"""The pretrained language model that a run starts from, and returns to when it resumes.

A new run takes the weights of `model.pretrained`. If `tuning.method` freezes them, its
checkpoints do not hold them, and every start reads them from that folder again.
`WORKDIR/pretrained.json` keeps the digest of its weight files: other weights are
refused, while the folder may move.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import jax

from tokenrec.config import Config, data_directory
from tokenrec.config.backbones import is_decoder
from tokenrec.errors import InputError
from tokenrec.language.load import LoadReport, load_weights
from tokenrec.language.new_rows import draw_rows, root_mean_square
from tokenrec.language.tensor_files import folder_digest
from tokenrec.language.tokenizer_checks import check_tokenizer
from tokenrec.models.words import word_scale
from tokenrec.runtime import distributed
from tokenrec.runtime.files import is_file, read_json, write_json
from tokenrec.runtime.local_copy import local_copy
from tokenrec.runtime.paths import as_path
from tokenrec.state import ModelSpec, TrainState
from tokenrec.tuning import group_of, is_frozen, without_frozen

PRETRAINED_FILE = "pretrained.json"
WORDS = "words/inputs"
# Tensors that a message lists.
_LISTED = 5


def start_from_pretrained(model: ModelSpec, state: TrainState) -> TrainState:
    """Put the weights of `model.pretrained` into a state that was drawn from the seed.

    New rows start like words, and the learned scale of a maker (`tokens.output_scale`)
    as the root mean square of a word. Call it under `jax.set_mesh`.

    Raises:
      InputError: on all processes, if the folder has other weights than the model or
        another tokenizer than the data set, or weights are to be frozen and no folder
        is named.
    """
    config = model.config
    with distributed.raise_on_all_processes():
        _check_named(config)
        if is_decoder(config.model):
            check_tokenizer(config.model, model.schema, data_directory(config))
    if not config.model.pretrained:
        return state
    wanted = [name for name in state.params if group_of(name) in ("base", "words")]
    loaded, report = _load(config, state.params, wanted)
    _print_unused(config, report)
    params = state.params | loaded
    words, count = params[WORDS], config.model.decoder.vocabulary
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    for number, name in enumerate(sorted(params)):
        if group_of(name) == "rows":
            row_key = jax.random.fold_in(key, number)
            params[name] = draw_rows(row_key, words, count, params[name])
        elif group_of(name) == "makers" and name.endswith("/scale"):
            size = jax.jit(root_mean_square, static_argnums=1)(words, count)
            params[name] = params[name] * 0 + size * word_scale(config.model)
    return dataclasses.replace(state, params=params)


def add_frozen(
    model: ModelSpec, state: TrainState, abstract: TrainState, workdir: Path
) -> TrainState:
    """Add the frozen weights to the state of a checkpoint, which lacks them.

    Args:
      model: the model of the run.
      state: the state as it was restored.
      abstract: shapes and shardings of the whole state.
      workdir: folder of the run.

    Raises:
      InputError: on all processes, if the folder is missing or holds other weights than
        those that the run has been trained with.
    """
    config = model.config
    frozen = [name for name in abstract.params if is_frozen(config, name)]
    if not frozen:
        return state
    with distributed.raise_on_all_processes():
        _check_named(config)
        _check_digest(config, workdir)
    loaded, _ = _load(config, abstract.params, frozen)
    return dataclasses.replace(state, params=state.params | loaded)


def saved_part(model: ModelSpec, state: TrainState) -> TrainState:
    """The part of a state, or of its description, that checkpoints hold."""
    return without_frozen(model.config, state)


def record_pretrained(config: Config, workdir: Path) -> None:
    """Note the digest of `model.pretrained` in a run's folder, or compare it.

    Call it in the first process, before the config of the run is written.

    Raises:
      InputError: as `add_frozen`.
    """
    path = as_path(workdir) / PRETRAINED_FILE
    if not config.model.pretrained:
        return
    if not is_file(path):
        digest = _digest(config.model.pretrained)
        write_json(path, {"folder": config.model.pretrained, "sha256": digest})
    elif config.tuning.method != "all":
        _check_digest(config, workdir)


def _check_named(config: Config) -> None:
    if config.tuning.method == "all" or config.model.pretrained:
        return
    raise InputError(
        f"tuning.method='{config.tuning.method}' with model.pretrained='' would freeze "
        "random weights; name the folder of the checkpoint, or train with "
        "tuning.method='all'"
    )


def _check_digest(config: Config, workdir: Path) -> None:
    path = as_path(workdir) / PRETRAINED_FILE
    folder = config.model.pretrained
    noted: Any = read_json(
        path, "the digest of model.pretrained", "restore the file from a backup"
    )
    digest = _digest(folder)
    if digest != noted["sha256"]:
        raise InputError(
            f"model.pretrained='{folder}' holds other weights (sha256 {digest[:12]}..) "
            f"than the run in '{workdir}' was trained with ({noted['sha256'][:12]}.., "
            f"then in '{noted['folder']}'); give the folder with those"
        )


@functools.cache
def _digest(folder: str) -> str:
    """Digest of the weight files of a folder, read once by a process."""
    return folder_digest(local_copy(folder))


def _load(
    config: Config, params: dict[str, Any], names: list[str]
) -> tuple[dict[str, jax.Array], LoadReport]:
    """Load weights with the shapes, types and shardings of `params`."""
    mesh = jax.sharding.get_mesh()
    wanted = {}
    for name in names:
        leaf = params[name]
        spec = jax.typeof(leaf).sharding.spec
        wanted[name] = jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec)
        )
    with distributed.raise_on_all_processes():
        folder = local_copy(config.model.pretrained)
        loaded, report = load_weights(folder, config, wanted)
        if report.missing:
            raise InputError(
                f"model.pretrained='{folder}' has no tensors for "
                f"{', '.join(report.missing[:_LISTED])}; give a whole checkpoint"
            )
    return loaded, report


def _print_unused(config: Config, report: LoadReport) -> None:
    if not report.unused or not distributed.is_first_process():
        return
    some = ", ".join(report.unused[:_LISTED])
    print(
        f"tokenrec: {len(report.unused)} tensors of '{config.model.pretrained}' are not "
        f"used: {some}{', ..' if len(report.unused) > _LISTED else ''}",
        file=sys.stderr,
    )

"""Sizes and weights of a checkpoint become those of `Decoder`, in every variant."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.language.checkpoints import config_of
from tests.language.hf_models import CONFIGS, write_model
from tests.models.backbones.language_models import (
    decoder_weights,
    kind_of,
    model_config,
)
from tokenrec.language.load import load_weights


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_and_weights_of_a_checkpoint(name: str, tmp_path: Path) -> None:
    """Read by `tokenrec/language/`, and by the few lines of the tests."""
    tensors = write_model(tmp_path, name)
    config = config_of(kind_of(name), tmp_path, scan=3)
    expected = model_config(CONFIGS[name], scan=3)
    assert config.model == dataclasses.replace(expected, pretrained=str(tmp_path))
    weights = {
        f"backbone/{weight}": value
        for weight, value in decoder_weights(expected, tensors).items()
    }
    weights["words/inputs"] = np.asarray(tensors["model.embed_tokens.weight"])
    if not expected.decoder.tied:
        weights["words/outputs"] = np.asarray(tensors["lm_head.weight"])
    wanted = {
        weight: jax.ShapeDtypeStruct(value.shape, value.dtype)
        for weight, value in weights.items()
    }
    loaded, report = load_weights(tmp_path, config, wanted)
    assert loaded.keys() == weights.keys()
    assert (report.unused, report.missing) == ((), ())
    for weight, value in weights.items():
        np.testing.assert_array_equal(loaded[weight], value, err_msg=weight)

"""Rotary positions of a `config.json`: one base and scaling, or one per layer type.

transformers 4    rope_theta, rope_scaling; gemma3 also rope_local_base_freq
transformers 5    rope_parameters; those of gemma3 by layer type
"""

from __future__ import annotations

from typing import Any

from tokenrec.errors import InputError
from tokenrec.language.config_object import ConfigObject

# Defaults of transformers.
_BASE = 10_000.0
_GLOBAL_BASE, _LOCAL_BASE = 1_000_000.0, 10_000.0
_FULL, _SLIDING = "full_attention", "sliding_attention"


def rope_fields(
    kind: str, text: ConfigObject, *, sliding: bool
) -> tuple[float, dict[str, Any]]:
    """Read the rotary positions.

    Args:
      kind: `model.kind`.
      text: the object of the text model.
      sliding: some layers have a window.

    Returns:
      `model.rope_base`, and the rope fields of `model.decoder`.

    Raises:
      InputError: a value is wrong, or a scaling that the decoder does not have.
    """
    by_layer_type = kind == "gemma3"
    parameters = text.object("rope_parameters") or ConfigObject({}, text.where)
    types = [key in (_FULL, _SLIDING) for key in parameters.values]
    if not all(types) if by_layer_type else any(types):
        form = "one object per layer type" if by_layer_type else "one object"
        raise text.error(
            "rope_parameters", f"is not {form}, as model.kind='{kind}' needs"
        )
    scaling = text.object("rope_scaling") or ConfigObject({}, text.where)
    if not by_layer_type:
        base = {"rope_theta": text.values.get("rope_theta", _BASE)}
        values = parameters.with_defaults(base).updated(scaling)
        fields = _scaling(values)
        if sliding and fields["rope_scaling"] != "none":
            raise InputError(
                f"{text.where}: rope_type='{fields['rope_scaling']}' with sliding layers"
                f", whose positions model.kind='{kind}' does not scale; use a checkpoint "
                "without one of them"
            )
        return values.number("rope_theta", above=1), {"local_rope_base": 0.0, **fields}
    # Scaling is that of the full layers; the positions of sliding ones stay near.
    full = _part(parameters, _FULL)
    base = {"rope_theta": text.values.get("rope_theta", _GLOBAL_BASE)}
    full = full.with_defaults(base).updated(scaling)
    base = {"rope_theta": text.values.get("rope_local_base_freq", _LOCAL_BASE)}
    local = _part(parameters, _SLIDING).with_defaults(base)
    if _scaling(local)["rope_scaling"] != "none":
        raise local.error("rope_type", "scales sliding layers, which gemma3 does not")
    local_base = local.number("rope_theta", above=1) if sliding else 0.0
    return full.number("rope_theta", above=1), {
        "local_rope_base": local_base,
        **_scaling(full),
    }


def _part(parameters: ConfigObject, layer_type: str) -> ConfigObject:
    where = f"{parameters.where}, '{layer_type}'"
    return parameters.object(layer_type) or ConfigObject({}, where)


def _scaling(values: ConfigObject) -> dict[str, Any]:
    """Fields of `model.decoder` for the scaling of frequencies."""
    if values.get("partial_rotary_factor") not in (None, 1):
        raise values.error("partial_rotary_factor", "rotates parts of heads")
    # Files of before 2024 write `type`.
    kind = values.get("rope_type") or values.get("type") or "default"
    fields: dict[str, Any] = {
        "rope_scaling": "none",
        "rope_factor": 1.0,
        "rope_low": 1.0,
        "rope_high": 4.0,
        "rope_context": 0,
    }
    if kind == "default":
        return fields
    if kind not in ("linear", "llama3"):
        raise InputError(
            f"{values.where}: rope_type={kind!r} is none of default, linear and llama3, "
            "which the decoder computes; use a checkpoint with one of these"
        )
    fields |= {"rope_scaling": kind, "rope_factor": values.number("factor")}
    if kind == "linear":
        return fields
    fields |= {
        "rope_low": values.number("low_freq_factor"),
        "rope_high": values.number("high_freq_factor"),
        "rope_context": values.integer("original_max_position_embeddings"),
    }
    if fields["rope_high"] <= fields["rope_low"]:
        raise values.error("high_freq_factor", "is not above low_freq_factor")
    return fields

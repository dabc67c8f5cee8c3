"""Options of the compiler: by chip, by config, and refused ones by name."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests.worlds import mesh_of
from tokenrec.compiler_options import compiler_options, refusals_of
from tokenrec.errors import InputError


def mesh_like(kind):
    device = SimpleNamespace(platform="tpu", device_kind=kind)
    return SimpleNamespace(devices=np.array([device]))


def test_a_cpu_has_those_of_the_config_only():
    mesh = mesh_of(2, 2, 2)
    assert compiler_options(mesh) is None
    assert compiler_options(mesh, {"xla_a": "1"}) == {"xla_a": "1"}


def test_a_config_goes_before_the_defaults_of_a_chip():
    defaults = compiler_options(mesh_like("TPU v5"))
    assert defaults["xla_tpu_enable_pincer_short_emitter"] is False
    name = max(defaults)
    found = compiler_options(mesh_like("TPU v5"), {name: "chosen"})
    assert found == defaults | {name: "chosen"}


def test_an_empty_value_leaves_an_option_to_the_compiler():
    mesh = mesh_like("TPU v5p")
    defaults = compiler_options(mesh)
    assert defaults == compiler_options(mesh_like("TPU v5"))
    name = "xla_tpu_scoped_vmem_limit_kib"
    assert compiler_options(mesh, {name: ""}) == {
        other: value for other, value in defaults.items() if other != name
    }


def test_a_refused_option_is_named_with_the_field():
    chosen = {"xla_no_such_option": "1"}
    compile_it = jax.jit(lambda x: x + 1, compiler_options=chosen)
    with (
        pytest.raises(
            InputError, match=r"train\.compiler_options=.*refuses xla_no_such_option"
        ),
        refusals_of(chosen),
    ):
        compile_it(1.0)

"""The branch beside the backbone against its equations, in the model and on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.backbones.machine import noisy, split
from tests.worlds import (
    SCHEMA,
    TASKS,
    mesh_of,
    one_device,
    place,
    random_batch,
    tiny,
)
from tokenrec.config.validate import validate
from tokenrec.errors import InputError
from tokenrec.models.branch import Branch
from tokenrec.models.stream_layout import candidate_mask, stream_layout
from tokenrec.planner.describe import describe
from tokenrec.sharding import RULES
from tokenrec.state import bind_params, build_model, init_state
from tokenrec.step import eval_step, gradients, step_inputs
from tokenrec.tokens.layout import Layout

SCORES = jax.jit(eval_step, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def step_gradients(model, state, batch):
    return gradients(model, state.params, step_inputs(model, state, batch))


@pytest.fixture(autouse=True)
def mesh():
    mesh = one_device()
    with jax.set_mesh(mesh):
        yield mesh


def branched(branch="din", **options):
    model = {"branch": branch, "layers": 1, "windows": (), "ffn_width": 32}
    return tiny(events=4, **{"model": model | options.pop("model", {})} | options)


def one_target(w, user, events, target, read, layers, din):
    """The module's equations for one target; `events: [n, d]` are the earlier ones."""
    width = len(target)
    parts = [user.mean(0)] if len(user) else []
    mean, interest = jnp.zeros(width), jnp.zeros(width)
    for event in events:
        mean += event / len(events)
        if din:
            pair = jnp.concatenate([event, target, event - target, event * target])
            hidden = pair @ w["unit/kernel"].reshape(4 * width, -1) + w["unit/bias"]
            weight = jax.nn.silu(hidden) @ w["unit/output"] + w["unit/output_bias"]
            interest += weight * event
    x_0 = jnp.concatenate([*parts, target, mean, read, *([interest] if din else [])])
    crossed = deep = x_0
    for n in range(layers):
        kernel, bias = w[f"crosses/{n}/kernel"], w[f"crosses/{n}/bias"]
        crossed = x_0 * (crossed @ kernel + bias) + crossed
        kernel, bias = w[f"deep/hidden/{n}/kernel"], w[f"deep/hidden/{n}/bias"]
        deep = jax.nn.silu(deep @ kernel + bias)
    return jnp.concatenate([crossed, deep]) @ w["output/kernel"] + w["output/bias"]


def slow_branch(w, x, readouts, layout: Layout, lengths, layers, din):
    """`[B, N, d]`, sample by sample and target by target; padding is zero."""
    samples = []
    for tokens, reads, length in zip(x, readouts, lengths, strict=True):
        user, skip = tokens[layout.positions_of("user")], layout.events - length
        if len(layout.positions_of("state")):
            states, actions = (tokens[layout.positions_of(r)] for r in ROLES)
            events = (states + actions)[skip:]
        else:
            events = tokens[layout.positions_of("event")][skip:]
        made = []
        for number, position in enumerate(layout.readout):
            before = events if layout.candidates else events[: max(number - skip, 0)]
            if not layout.candidates and number < skip:
                made.append(jnp.zeros(x.shape[2]))
                continue
            read, target = reads[number], tokens[position]
            made.append(one_target(w, user, before, target, read, layers, din))
        samples.append(jnp.stack(made))
    return jnp.stack(samples)


ROLES = ("state", "action")
CASES = {
    "uc_mean": ("mean", {"paradigm": "uc", "model": {"branch_layers": 3}}),
    "uc_din": ("din", {"paradigm": "uc"}),
    "requests_din": (
        "din",
        {"candidates": 2, "fused": True, "tokens": {"user_tokens": 2}},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_equations(case):
    branch, options = CASES[case]
    config = validate(branched(branch, **options))
    layout, lengths = stream_layout(config, SCHEMA, 4), [4, 2]
    events = np.arange(4) >= 4 - np.array(lengths)[:, None]
    graph, weights = nnx.split(Branch(config.model, layout, rngs=nnx.Rngs(0)))
    names = {"/".join(map(str, p)): w[...] for p, w in nnx.to_flat_state(weights)}
    params, random = noisy(names), np.random.default_rng(0)
    size = (2, layout.length, config.model.width)
    x = random.normal(size=size).astype(np.float32)
    reads = random.normal(size=(2, len(layout.readout), size[2])).astype(np.float32)
    # Padded states of UC are not compared.
    real = events[..., None] if config.data.paradigm == "uc" else 1.0

    def fast(params, x, reads):
        paths = [path for path, _ in nnx.to_flat_state(weights)]
        bound = [(p, nnx.Param(params["/".join(map(str, p))])) for p in paths]
        module = nnx.merge(graph, nnx.from_flat_state(bound))
        return module(x, reads, layout, split(events)[0], None) * real

    def slow(params, x, reads):
        layers, din = config.model.branch_layers, branch == "din"
        return slow_branch(params, x, reads, layout, lengths, layers, din) * real

    factors = random.normal(size=reads.shape).astype(np.float32)

    def run(function, *inputs):
        def loss(*inputs):
            values = function(*inputs)
            return jnp.sum(values * factors), values

        grad = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
        return jax.jit(grad)(params, *inputs)

    found, wanted = run(fast, *split(x, reads)), run(slow, x, reads)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert np.any(b)
        # float32 sums in another order, of crosses that no norm bounds. Measured: 1e-6 of the
        # largest.
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


def build(config):
    model = build_model(config, SCHEMA, TASKS)
    return model, init_state(model, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_adds_the_branch_to_the_read_outs_of_all_positions(dtype, mesh):
    config = branched(paradigm="uc", model={"dtype": dtype})
    model, state = build(config)
    batch = place(random_batch(config), mesh)

    @jax.jit
    def read(state, batch):
        module = bind_params(model, state.params)
        entities = model.embedder.look_up(state.tables, batch)
        x, layout = module.make_stream(entities, batch)
        out = module.backbone(x, layout, batch.valid, candidate_mask(batch), None)
        added = module.branch(x, out, layout, batch.valid, None)
        sums = out.astype(jnp.float32) + added.astype(jnp.float32)
        traced = module.trace(entities, batch, None)[1][-1]
        return module(entities, batch, None), sums, traced, added

    found, wanted, traced, added = read(state, batch)
    assert found.dtype == jnp.float32
    assert added.dtype == jnp.dtype(dtype)
    assert np.abs(added).max() > 1e-2
    # XLA may keep more digits than bfloat16 between fused operations.
    atol = 1e-5 if dtype == "float32" else 0.05
    np.testing.assert_allclose(found, wanted, atol=atol)
    np.testing.assert_allclose(traced, wanted, atol=atol)


def test_skipping_unneeded_positions_keeps_the_scores(mesh):
    scores = []
    for needed_rows in (True, False):
        model = {"layers": 2, "windows": (4,), "needed_rows": needed_rows}
        config = branched(candidates=2, model=model)
        model, state = build(config)
        scores.append(SCORES(model, state, place(random_batch(config), mesh)))
    # float32 sums in another order.
    np.testing.assert_allclose(*scores, atol=1e-5)


def test_loss_and_gradients_of_a_step_on_a_mesh_are_those_of_one_device():
    config = branched(paradigm="uc", model={"branch_layers": 1, "dropout": 0.1})
    batch, found = random_batch(config), []
    for mesh in (one_device(), mesh_of(2, 2, 2)):
        with jax.set_mesh(mesh):
            spec, state = build(config)
            kernel = state.params["branch/crosses/0/kernel"]
            assert kernel.sharding.spec == RULES(None, "embed")
            found.append(step_gradients(spec, state, place(batch, mesh)))
    for one, many in zip(*map(jax.tree.leaves, found), strict=True):
        one, many = np.asarray(one), np.asarray(many)
        # Products split over devices are sums of partial sums.
        np.testing.assert_allclose(many, one, rtol=0, atol=1e-5 * np.abs(one).max())


def test_a_model_without_the_branch_starts_from_the_same_weights():
    options = {"paradigm": "uc"}
    (_, with_branch), (_, without) = (
        build(branched(kind, **options)) for kind in ("din", "none")
    )
    names = {name for name in with_branch.params if name.startswith("branch/")}
    assert names == with_branch.params.keys() - without.params.keys()
    for name, weight in without.params.items():
        assert np.array_equal(weight, with_branch.params[name])


def test_a_rival_can_have_the_branch_and_its_weights_are_counted(mesh):
    model = {"kind": "rankmixer", "windows": (), "layers": 1}
    config = validate(tiny(events=6, paradigm="uc", model=model | {"branch": "mean"}))
    plain = validate(tiny(events=6, paradigm="uc", model=model))
    spec, state = build(config)
    assert np.isfinite(SCORES(spec, state, place(random_batch(config), mesh))).all()
    figures, fewer = describe(config, SCHEMA), describe(plain, SCHEMA)
    size = sum(w.size for n, w in state.params.items() if n.startswith("branch/"))
    assert figures["parameters"]["by_part"]["branch"] == size
    assert figures["parameters"]["dense"] - fewer["parameters"]["dense"] == size
    # Every kernel is multiplied with each of the T targets.
    more = figures["flops_per_example"] - fewer["flops_per_example"]
    kernels = sum(
        w.size
        for n, w in state.params.items()
        if n.startswith("branch/") and w.ndim > 1
    )
    assert more >= 2 * 6 * kernels


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("data", "objective", "retrieval", "data.objective='retrieval' with model.b"),
        ("tokens", "target_tokens", 2, "tokens.target_tokens=2 with model.branch="),
        ("tokens", "compression", "mlp", "tokens.compression='mlp' with model.branch="),
        ("model", "branch", "none", "model.branch_layers=3 with model.branch='none'"),
    ],
)
def test_what_the_branch_does_not_support_is_refused(section, field, value, message):
    config = branched(candidates=2, fused=True, model={"branch_layers": 3})
    setattr(getattr(config, section), field, value)
    with pytest.raises(InputError) as caught:
        validate(config)
    assert message in str(caught.value)

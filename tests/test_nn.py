"""Flax layers against a dense mixture of experts that loops over them, on one device."""

import functools
import math
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import suite
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep.nn import MoE, Router, _matmul, _rebalance

TOKENS, HIDDEN, INNER, EXPERTS, TOPK = 32, 16, 8, 8, 2
EP, DP_EP, DP_EP_TP = dict(ep=4), dict(dp=2, ep=2), dict(dp=2, ep=2, tp=2)
# GPUs add up in another order, and exponentials differ.
TOLERANCE = {"cuda": 2e-3}


@pytest.fixture(autouse=True)
def long_mantissas():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def on_cpus():
    """For tests of no GPU implementation, where there may be GPUs."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def make_mesh(implementation: str, axes: dict[str, int]) -> Mesh:
    """Axes of these sizes, halved from the front until the devices suffice."""
    devices, sizes = suite.devices_of(implementation), list(axes.values())
    while math.prod(sizes) > len(devices):
        largest = next(i for i, size in enumerate(sizes) if size > 1)
        sizes[largest] //= 2
    grid = np.array(devices[: math.prod(sizes)]).reshape(sizes)
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(sizes))


def axes_of(mesh: Mesh) -> dict:
    """The arguments of MoE that name the axes."""
    return dict(
        data_axes=tuple(axis for axis in mesh.axis_names if axis == "dp"),
        tensor_axis="tp" if "tp" in mesh.axis_names else None,
    )


def make_layer(mesh: Mesh, implementation: str | None = None, seed=0, routing=None, communicator=None, **arguments):
    rngs = nnx.Rngs(seed)
    router = Router(HIDDEN, EXPERTS, TOPK, rngs=rngs, **(routing or {}))
    if router.bias is not None:
        router.bias[...] = jnp.asarray(np.random.default_rng(seed).normal(size=EXPERTS) / 4, jnp.float32)
    own = dict(mesh=mesh, max_tokens_per_rank=TOKENS, implementation=implementation) if communicator is None else {}
    arguments = dict(dtype=jnp.float32) | own | axes_of(mesh) | arguments
    return MoE(router, INNER, communicator=communicator, rngs=rngs, **arguments)


@pytest.fixture
def layer_of():
    """`make_layer`, whose communicators are destroyed."""
    layers = []

    def make(*arguments, **keywords):
        layers.append(make_layer(*arguments, **keywords))
        return layers[-1]

    yield make
    for layer in layers:
        layer.communicator.destroy()


def tokens_of(mesh: Mesh | None = None, shape=(TOKENS, HIDDEN), seed=0) -> jax.Array:
    x = np.random.default_rng((1, seed)).normal(size=shape).astype(np.float32)
    axes = () if mesh is None else tuple(axis for axis in mesh.axis_names if axis != "tp")
    return jnp.asarray(x) if mesh is None else jax.device_put(x, NamedSharding(mesh, P(axes)))


# ---- The dense layer ----


def dense_swiglu(x, gate, up, down):
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def dense_selection(scores: np.ndarray, bias, num_groups=1, topk_groups=None) -> np.ndarray:
    """bool [T, E]: a loop over tokens."""
    selected = np.zeros(scores.shape, bool)
    for chosen, score in zip(selected, scores + bias, strict=True):
        groups = score.reshape(num_groups, -1)
        if topk_groups is not None:
            values = [sum(sorted(group)[-2:]) for group in groups]
            best = np.argsort(values)[num_groups - topk_groups :]
            groups[[group for group in range(num_groups) if group not in best]] = -np.inf
        chosen[np.argsort(groups.reshape(-1))[-TOPK:]] = True
    return selected


def dense_layer(
    parameters, x, bias, *, score="softmax", normalize_weights=True, scaling_factor=1.0, selection_bias=False, **groups
):
    """[T, H] -> [T, H], balance loss, z loss, load."""
    del selection_bias
    logits = x @ parameters["router"]["kernel"]
    scores = jax.nn.softmax(logits) if score == "softmax" else 1 / (1 + jnp.exp(-logits))
    structure = jax.ShapeDtypeStruct(scores.shape, bool)
    select = functools.partial(dense_selection, **groups)
    selected = jax.pure_callback(
        lambda scores, bias: select(np.array(scores), np.array(bias)),
        structure,
        *jax.lax.stop_gradient((scores, bias)),
    )
    weights = jnp.where(selected, scores, 0)
    if normalize_weights:
        weights = weights / weights.sum(-1, keepdims=True)
    kernels = tuple(parameters[name] for name in ("gate", "up", "down"))

    def add_expert(y, expert):
        kernels, weights = expert
        return y + scaling_factor * weights[:, None] * dense_swiglu(x, *kernels), None

    y, _ = jax.lax.scan(add_expert, jnp.zeros_like(x), (kernels, weights.T))
    if "shared_gate" in parameters:
        y += dense_swiglu(x, *(parameters[f"shared_{name}"] for name in ("gate", "up", "down")))
    load = selected.astype(jnp.float32).mean(0) / TOPK
    balance_loss = EXPERTS * jnp.sum(load * (scores / scores.sum(-1, keepdims=True)).mean(0))
    z_loss = jnp.square(jnp.log(jnp.exp(logits).sum(-1))).mean()
    return y, balance_loss, z_loss, load


def loss_of_outputs(y, balance_loss, z_loss):
    weights = jnp.asarray(np.random.default_rng(5).normal(size=(TOKENS, HIDDEN)), jnp.float32)
    return jnp.sum(y.reshape(TOKENS, HIDDEN) * weights) + 3 * balance_loss + z_loss


def layer_loss(layer, x):
    y, aux = layer(x)
    return loss_of_outputs(y, aux.balance_loss, aux.z_loss), (y, aux)


def parameters_of(layer) -> dict:
    """On the host: the dense layer runs on one device."""
    return jax.device_get(nnx.to_pure_dict(nnx.state(layer, nnx.Param)))


def assert_close(got, wanted, implementation, what):
    got, wanted = np.asarray(jax.device_get(got)), np.asarray(wanted)
    scale = max(1, np.abs(wanted).max())
    np.testing.assert_allclose(got / scale, wanted / scale, atol=TOLERANCE.get(implementation, 2e-5), err_msg=what)


def check_against_dense(layer, implementation, routing, shape=(TOKENS, HIDDEN), loss=layer_loss):
    x = tokens_of(layer.communicator.mesh, shape)
    grad = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, (y, aux)), (got, got_x) = nnx.jit(grad)(layer, x)
    layer.communicator.check()
    assert y.shape == x.shape and y.sharding.is_equivalent_to(x.sharding, x.ndim)

    bias = np.zeros(EXPERTS, np.float32) if layer.router.bias is None else jax.device_get(layer.router.bias[...])

    def dense_loss(parameters, x):
        y, balance_loss, z_loss, load = dense_layer(parameters, x.reshape(TOKENS, HIDDEN), bias, **routing)
        return loss_of_outputs(y, balance_loss, z_loss), (y, balance_loss, z_loss, load)

    with jax.default_device(jax.devices("cpu")[0]):
        dense_grad = jax.jit(jax.value_and_grad(dense_loss, argnums=(0, 1), has_aux=True))
        (_, wanted), (gradients, wanted_x) = dense_grad(parameters_of(layer), tokens_of(shape=shape))
    assert_close(y.reshape(TOKENS, HIDDEN), wanted[0], implementation, "y")
    for name, want in zip(("balance_loss", "z_loss", "load"), wanted[1:], strict=True):
        assert_close(getattr(aux, name), want, implementation, name)
    assert int(aux.num_dropped) == 0
    got = nnx.to_pure_dict(got)
    assert jax.tree.structure(got) == jax.tree.structure(gradients)
    for path, want in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(want).max() > 1e-3
        assert_close(functools.reduce(lambda tree, key: tree[key.key], path, got), want, implementation, str(path))
    assert_close(got_x, wanted_x, implementation, "x")


SIGMOID = dict(score="sigmoid", selection_bias=True, scaling_factor=2.5)


@pytest.mark.parametrize(
    ("axes", "shape", "routing", "arguments"),
    [
        (EP, (TOKENS, HIDDEN), dict(), dict()),
        (EP, (TOKENS, HIDDEN), SIGMOID, dict(num_shared_experts=1)),
        (DP_EP, (8, 4, HIDDEN), SIGMOID | dict(num_groups=4, topk_groups=2), dict()),
        (
            DP_EP_TP,
            (8, 4, HIDDEN),
            dict(normalize_weights=False, num_groups=2, topk_groups=1),
            dict(num_shared_experts=2),
        ),
    ],
    ids=["softmax", "sigmoid-bias-shared", "groups-bias-dp", "softmax-groups-shared-tp"],
)
def test_is_the_dense_layer(layer_of, native_implementation, axes, shape, routing, arguments):
    layer = layer_of(make_mesh(native_implementation, axes), native_implementation, routing=routing, **arguments)
    check_against_dense(layer, native_implementation, routing, shape)


def test_reference_is_the_dense_layer(layer_of, on_cpus):
    layer = layer_of(make_mesh("reference", DP_EP_TP), "reference", routing=dict(score="sigmoid"))
    check_against_dense(layer, "reference", dict(score="sigmoid"))


def test_remat_of_an_overlapped_layer(layer_of, native_implementation):
    mesh = make_mesh(native_implementation, EP)
    sizes = dict(num_experts=EXPERTS, hidden_size=HIDDEN, topk=TOPK, max_tokens_per_rank=TOKENS)
    arguments = dict(dtype=jnp.float32, implementation=native_implementation, max_requests=1, expert_alignment=4)
    comm = jax_ep.MoECommunicator(mesh, **sizes, **arguments)
    layer = layer_of(mesh, communicator=comm, num_shared_experts=1)

    def rematerialised(layer, x):
        y, aux = nnx.remat(lambda layer, x: layer(x))(layer, x)
        return loss_of_outputs(y, aux.balance_loss, aux.z_loss), (y, aux)

    check_against_dense(layer, native_implementation, {}, loss=rematerialised)


def test_tokamax_multiplies_on_gpus_where_it_is_installed(native_implementation, monkeypatch):
    """One that mixes dtypes, knows nothing of axes that its results vary over, leaves rows beyond all groups as memory
    was, and multiplies them by zero where they do not count, as tokamax does."""
    mesh = make_mesh(native_implementation, EP)

    def ragged_dot(left, right, sizes, *, ragged_dot_dimension_numbers=None, **types):
        dimensions = ragged_dot_dimension_numbers or _matmul._dimensions((1, 1), [0])
        out = jax.lax.ragged_dot_general(left, right, sizes, dimensions, **types)
        out = jax.lax.pmax((out * jnp.float32(1)).astype(out.dtype), "ep")  # of what is the same everywhere
        return out.at[5:].set(jnp.nan) if out.ndim == 2 else out + (left[5:] * 0).sum() + (right[5:] * 0).sum()

    rng = np.random.default_rng(0)
    rows, kernels, gradient = (jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in ((6, 8), (2, 8, 4), (6, 8)))
    rows, gradient, sizes = rows.at[5:].set(0), gradient.at[5:].set(0), jnp.array([1, 4])

    def run(matmul):
        @jax.jit
        @jax.shard_map(mesh=mesh, in_specs=(P("ep"), P(), P("ep")), out_specs=(P("ep"), P("ep"), P()))
        def step(rows, kernels, gradient):
            def layer(rows, kernels):
                return matmul(jnp.tanh(matmul(rows[0], kernels, sizes)), kernels.mT, sizes)

            # Kernels are the same on all devices, so their gradients are summed.
            out, pull = jax.vjp(layer, rows, kernels)
            return out[None], *pull(gradient[0])

        return step(jnp.stack([rows] * mesh.size), kernels, jnp.stack([gradient] * mesh.size))

    fake = types.ModuleType("tokamax")
    fake.ragged_dot = fake.ragged_dot_general = ragged_dot
    try:
        monkeypatch.setitem(sys.modules, "tokamax", None)
        _matmul._has_tokamax.cache_clear()
        assert _matmul.default_grouped_matmul("cuda") is jax.lax.ragged_dot
        monkeypatch.setitem(sys.modules, "tokamax", fake)
        _matmul._has_tokamax.cache_clear()
        assert _matmul.default_grouped_matmul("cpu") is jax.lax.ragged_dot
        got, wanted = run(_matmul.default_grouped_matmul("cuda")), run(jax.lax.ragged_dot)
    finally:
        _matmul._has_tokamax.cache_clear()
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0.02, atol=0.02)


def test_tokamax_gives_what_ragged_dot_gives():
    """In the layer: under `shard_map` and `grad`, with rows beyond all groups, which tokamax leaves as they are."""
    pytest.importorskip("tokamax")
    if suite.missing("cuda"):
        pytest.skip(suite.missing("cuda"))
    hidden, inner, tokens = 256, 128, 512
    mesh = make_mesh("cuda", EP)

    @nnx.jit
    def step(layer, x):
        def loss(layer, x):
            y, _ = layer(x)
            return jnp.square(y.astype(jnp.float32)).mean(), y

        (_, y), gradients = nnx.value_and_grad(loss, has_aux=True)(layer, x)
        return y, nnx.state(gradients)

    def run(**arguments):
        router = Router(hidden, EXPERTS, TOPK, rngs=nnx.Rngs(1))
        layer = MoE(router, inner, mesh=mesh, max_tokens_per_rank=tokens, rngs=nnx.Rngs(0), **arguments)
        with layer.communicator:
            results = jax.device_get(step(layer, tokens_of(mesh, (tokens, hidden))))
        return layer, jax.tree.leaves(results)

    with jax.default_matmul_precision("default"):
        (ours, got), (_, wanted) = run(), run(grouped_matmul=jax.lax.ragged_dot)
    assert ours.grouped_matmul is _matmul._tokamax_ragged_dot
    for a, b in zip(got, wanted, strict=True):
        a, b = np.float32(a), np.float32(b)
        assert np.abs(a - b).max() <= 0.03 * np.abs(b).max()


def test_scan_over_layers(layer_of, native_implementation):
    mesh, num_layers = make_mesh(native_implementation, EP), 2
    comm = layer_of(mesh, native_implementation).communicator
    stacked = {nnx.PARTITION_NAME: None}

    @nnx.jit
    @nnx.vmap(transform_metadata=stacked)
    def create(key):
        rngs = nnx.Rngs(key)
        router = Router(HIDDEN, EXPERTS, TOPK, selection_bias=True, rngs=rngs)
        return MoE(router, INNER, communicator=comm, rngs=rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=(nnx.Carry, 0), transform_metadata=stacked)
    def forward(layer, x):
        y, aux = layer(x)
        layer.router.update_bias(aux.load, 0.5)
        return x + y, aux

    def loss(layers, x):
        y, aux = forward(layers, x)
        return jnp.square(y).mean(), (y, aux)

    layers = create(jax.random.split(jax.random.key(0), num_layers))
    assert layers.communicator is comm and layers.gate.out_sharding == (None, "ep", None, None)
    assert layers.gate[...].sharding.is_equivalent_to(NamedSharding(mesh, P(None, "ep")), 4)
    graph, state = nnx.split(layers)

    @jax.jit
    def one_by_one(state, x):
        for i in range(num_layers):
            y, aux = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))(x)
            x = x + y
        return x, aux.load

    x = tokens_of(mesh)
    wanted, last_load = jax.device_get(one_by_one(state, x))
    grad = nnx.value_and_grad(loss, has_aux=True)
    (_, (y, aux)), gradients = nnx.jit(grad)(layers, x)
    assert_close(y, wanted, native_implementation, "y")
    assert_close(aux.load[-1], last_load, native_implementation, "load")
    for gradient in jax.device_get(jax.tree.leaves(gradients)):
        assert np.all(np.isfinite(gradient)) and np.all(np.any(gradient, axis=tuple(range(1, gradient.ndim))))
    assert set(np.unique(jnp.abs(layers.router.bias[...]))) <= {0.0, 0.5}


def test_training_reduces_the_loss(layer_of, native_implementation):
    mesh = make_mesh(native_implementation, DP_EP)
    layer = layer_of(mesh, native_implementation, routing=dict(score="sigmoid", selection_bias=True))
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.Param)
    x, target = tokens_of(mesh), tokens_of(mesh, seed=1)

    def loss(layer, x):
        y, aux = layer(x)
        return jnp.square(y - target).mean() + 1e-2 * aux.balance_loss, aux

    @nnx.jit
    def step(layer, optimizer, x):
        (value, aux), gradients = nnx.value_and_grad(loss, has_aux=True)(layer, x)
        optimizer.update(layer, gradients)
        layer.router.update_bias(aux.load, 1e-3)
        return value

    before, comm = jax.device_get(layer.router.bias[...]), layer.communicator
    with jax.numpy_dtype_promotion("standard"):  # which optax needs
        losses = [float(jax.block_until_ready(step(layer, optimizer, x))) for _ in range(12)]
    layer.communicator.check()
    assert losses[-1] < 0.8 * losses[0]
    moved = jax.device_get(layer.router.bias[...]) - before
    assert np.any(moved) and np.abs(moved).max() < 12.1e-3  # by its own rule, not by the optimizer's
    assert layer.communicator is comm
    assert layer.gate[...].sharding.is_equivalent_to(NamedSharding(mesh, P("ep")), 3)


def test_partitioning_is_flax_metadata(layer_of, native_implementation):
    mesh = make_mesh(native_implementation, DP_EP_TP)
    layer = layer_of(mesh, native_implementation, num_shared_experts=1)
    specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(layer, nnx.Param)))
    assert specs["gate"] == specs["up"] == P("ep", None, "tp") and specs["down"] == P("ep", "tp", None)
    assert specs["shared_up"] == P(None, "tp") and specs["shared_down"] == P("tp", None)
    assert specs["router"]["kernel"] == P()
    assert layer.gate[...].sharding.spec == specs["gate"]
    graph, state = nnx.split(layer)
    assert nnx.merge(graph, state).communicator is layer.communicator and hash(graph) == hash(nnx.graphdef(layer))


def test_nothing_is_gathered_to_route(layer_of, on_cpus):
    layer = layer_of(make_mesh("cpu", DP_EP), "cpu", routing=dict(num_groups=4, topk_groups=2))
    graph, state = nnx.split(layer)
    program = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    text = program.lower(state, tokens_of(layer.communicator.mesh)).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text


def test_capacity_and_dtypes(layer_of, native_implementation):
    mesh = make_mesh(native_implementation, EP)
    ranks = mesh.size
    calls = []

    def grouped_matmul(rows, kernels, sizes):
        calls.append((rows.dtype, kernels.shape[0], sizes.shape))
        return jax.lax.ragged_dot(rows, kernels, sizes)

    arguments = dict(dtype=jnp.bfloat16, capacity_factor=0.5, max_tokens_per_rank=TOKENS // ranks)
    layer = layer_of(mesh, native_implementation, grouped_matmul=grouped_matmul, **arguments)
    assert layer.communicator.capacity == TOKENS // ranks * TOPK // 2
    y, aux = nnx.jit(lambda layer, x: layer(x))(layer, tokens_of(mesh))
    layer.communicator.check()
    assert y.dtype == jnp.bfloat16 and layer.gate[...].dtype == jnp.float32
    assert TOKENS * TOPK // 2 <= int(aux.num_dropped) < TOKENS * TOPK
    assert calls[:3] == [(jnp.bfloat16, EXPERTS // ranks, (EXPERTS // ranks,))] * 3


# ---- Slots, and rebalancing ----


def logical_parameters(parameters, slots) -> dict:
    """Those of slots, by expert; replicas must have the same bits."""
    first = np.array([np.flatnonzero(slots == expert)[0] for expert in range(EXPERTS)])
    for name in ("gate", "up", "down"):
        np.testing.assert_array_equal(parameters[name][first][slots], parameters[name])
    return parameters | {name: parameters[name][first] for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("axes", "slots", "arguments"),
    [(EP, 12, dict(num_shared_experts=1)), (DP_EP_TP, 10, dict())],
    ids=["ep", "dp-ep-tp"],
)
def test_slots_are_the_layer_without(layer_of, native_implementation, axes, slots, arguments):
    """Of the same keys: outputs, losses, and gradients by expert."""
    mesh = make_mesh(native_implementation, axes)
    plain = layer_of(mesh, native_implementation, **arguments)
    layer = layer_of(mesh, native_implementation, num_slots=slots, **arguments)
    grad = nnx.jit(nnx.value_and_grad(layer_loss, argnums=(0, 1), has_aux=True))
    results = []
    for one in (plain, layer):
        (_, (y, aux)), (gradients, gradient_of_x) = grad(one, tokens_of(mesh))
        one.communicator.check()
        results.append(jax.device_get((y, gradient_of_x, aux, nnx.to_pure_dict(gradients))))
    (want_y, want_x, want_aux, want), (y, x, aux, got) = results
    assert want_aux.tokens_per_expert is None and int(aux.num_dropped) == 0
    np.testing.assert_array_equal(aux.tokens_per_expert, np.round(want_aux.load * TOKENS * TOPK))
    got = logical_parameters(got, np.asarray(layer.slots[...]))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves((y, x, got)), jax.tree.leaves((want_y, want_x, want)), strict=True):
        assert_close(one, other, native_implementation, "")


class Skewed(Router):
    """Nearly all tokens to experts 6 and 7, which have no replicas at first."""

    def __call__(self, x):
        topk_ids, weights, aux = super().__call__(x)
        is_rare = jnp.arange(len(x), dtype=jnp.int32)[:, None] % 8 == 0
        favourites = jnp.broadcast_to(jnp.array([6, 7], jnp.int32), topk_ids.shape)
        return jnp.where(is_rare, topk_ids, favourites), weights, aux


class Stack(nnx.Module):
    """Layers in a list, one of which has the name of the other's kernel."""

    def __init__(self, layer):
        self.blocks = nnx.List([nnx.Linear(HIDDEN, HIDDEN, rngs=nnx.Rngs(0)), layer])
        self.gate = nnx.Param(jnp.zeros((12, HIDDEN, INNER)))

    def __call__(self, x):
        return self.blocks[1](self.blocks[0](x))


def optimizers_by_kernel() -> optax.GradientTransformation:
    """Each has `optax.MaskedNode` where the others have state, and Muon an array of coefficients besides."""
    optimizers = dict(gate=optax.sgd(1e-2, momentum=0.9), up=optax.adam(1e-2), others=optax.contrib.muon(1e-2))

    def label(path, _) -> str:
        return next((key.key for key in path if getattr(key, "key", None) in optimizers), "others")

    by_kernel = optax.multi_transform(optimizers, functools.partial(jax.tree_util.tree_map_with_path, label))
    return optax.chain(optax.clip(1.0), by_kernel)


def test_rebalancing_keeps_what_is_computed(layer_of, native_implementation):
    mesh = make_mesh(native_implementation, EP)
    comm_sizes = dict(num_experts=12, hidden_size=HIDDEN, topk=TOPK, max_tokens_per_rank=TOKENS, dtype=jnp.float32)
    comm = jax_ep.MoECommunicator(mesh, **comm_sizes, implementation=native_implementation)
    layer = layer_of(mesh, communicator=comm, num_slots=12, load_window=2)
    layer.router = Skewed(HIDDEN, EXPERTS, TOPK, rngs=nnx.Rngs(0))
    model = Stack(layer)
    optimizer = nnx.Optimizer(model, optimizers_by_kernel(), wrt=nnx.Param)
    x, traces = tokens_of(mesh), []

    @nnx.jit
    def step(model, optimizer, x):
        traces.append(1)

        def loss(model):
            y, aux = model(x)
            return jnp.square(y).mean() + model.gate[...].sum(), aux

        (value, aux), gradients = nnx.value_and_grad(loss, has_aux=True)(model)
        model.blocks[1].record_load(aux)
        optimizer.update(model, gradients)
        return value

    def by_expert():
        """Parameters, moments and the rest, by expert; replicas have the same bits."""
        slots = np.asarray(layer.slots[...])
        state = nnx.to_pure_dict(nnx.state((model, optimizer), nnx.Not(jax_ep.nn.ExpertSlots)))
        first = np.array([np.flatnonzero(slots == expert)[0] for expert in range(EXPERTS)])

        def one(path, leaf):
            leaf, names = np.asarray(leaf), [key.key for key in path]
            if names[-1] not in ("gate", "up", "down") or "blocks" not in names:
                return leaf
            np.testing.assert_array_equal(leaf[first][slots], leaf)
            return leaf[first]

        return jax.tree_util.tree_map_with_path(one, state), slots

    outputs = nnx.jit(lambda model, x: model(x)[0])
    assert layer.rebalance(optimizer, model) == 0
    with jax.numpy_dtype_promotion("standard"):
        for slack in (0.05, None):
            for _ in range(2):
                step(model, optimizer, x)
            (before, old), y, num_traces = by_expert(), jax.device_get(outputs(model, x)), len(traces)
            moves = layer.rebalance(optimizer, model, slack=slack)
            after, new = by_expert()
            assert (new != old).any() or mesh.size < 4  # fewer ranks may be balanced as they are
            assert moves == jax_ep.eplb.count_moves(old[None], new[None], mesh.size)[0]
            jax.tree.map(np.testing.assert_array_equal, after, before)
            assert_close(outputs(model, x), y, native_implementation, "y")
            step(model, optimizer, x)
            by_expert()
            assert len(traces) == num_traces
            load = np.asarray(layer.recorded_load[...]).sum(0)[None]
            assert load.sum() == 2 * TOKENS * TOPK and (load[0, 6:] > 40).all()
            imbalance = [jax_ep.eplb.gpu_imbalance(load, slots[None], mesh.size)[0] for slots in (old, new)]
            assert slack is None or imbalance[1] < imbalance[0] or mesh.size < 4
    comm.check()


def test_rebalancing_a_stack(layer_of, native_implementation):
    mesh = make_mesh(native_implementation, EP)
    sizes = dict(num_experts=12, hidden_size=HIDDEN, topk=TOPK, max_tokens_per_rank=TOKENS, dtype=jnp.float32)
    comm = jax_ep.MoECommunicator(mesh, **sizes, implementation=native_implementation)
    stacked = {nnx.PARTITION_NAME: None}

    @nnx.jit
    @nnx.vmap(transform_metadata=stacked)
    def create(key):
        rngs = nnx.Rngs(key)
        return MoE(Router(HIDDEN, EXPERTS, TOPK, rngs=rngs), INNER, communicator=comm, num_slots=12, rngs=rngs)

    @nnx.jit
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=(nnx.Carry, 0), transform_metadata=stacked)
    def forward(layer, x):
        y, aux = layer(x)
        layer.record_load(aux)
        return x + y, aux.tokens_per_expert

    with comm:
        layers, x = create(jax.random.split(jax.random.key(0), 2)), tokens_of(mesh)
        before, counts = jax.device_get(forward(layers, x))
        np.testing.assert_array_equal(layers.recorded_load[...][:, -1], counts)
        assert counts.shape == (2, EXPERTS) and (layers.recorded_load[...].sum((1, 2)) == TOKENS * TOPK).all()
        old = np.asarray(layers.slots[...])
        moves = layers.rebalance(slack=None)
        new = np.asarray(layers.slots[...])
        assert moves == jax_ep.eplb.count_moves(old, new, mesh.size).sum()
        if mesh.size > 1:
            assert (new != old).any(1).all()
        assert_close(forward(layers, x)[0], before, native_implementation, "y")
        comm.check()


def test_rebalancing_every_few_steps(layer_of, native_implementation):
    """One call after each step. Checkpoints keep the count, and nothing is compiled again."""
    mesh = make_mesh(native_implementation, EP)

    def make():
        layer = layer_of(mesh, native_implementation, num_slots=12, load_window=2)
        layer.router = Skewed(HIDDEN, EXPERTS, TOPK, rngs=nnx.Rngs(0))
        return layer

    @nnx.jit
    def step(layer, x):
        y, aux = layer(x)
        layer.record_load(aux)
        return y

    layer, x, moves, slots = make(), tokens_of(mesh), [], []
    for number in range(8):
        y = step(layer, x)
        if number == 1:  # variables that come back from a program
            num_programs = step.jitted_fn._cache_size()
        if number == 4:
            restored, state = make(), jax.device_get(nnx.to_pure_dict(nnx.state(layer)))
        moves.append(layer.rebalance(every=3, slack=None))
        slots.append(np.asarray(layer.slots[...]))
    assert step.jitted_fn._cache_size() == num_programs
    assert [moves[number] for number in (0, 1, 3, 4, 6, 7)] == [0] * 6 and (moves[2] > 0 or mesh.size == 1)
    changed = [not np.array_equal(*pair) for pair in zip(slots, slots[1:], strict=False)]
    assert changed == [False, True, False, False, False, False, False]  # the load stays as it is
    assert layer.steps_since_plan[...].tolist() == [2]

    nnx.update(restored, nnx.State(state))
    assert_close(step(restored, x), y, native_implementation, "y")
    for wanted in (2, 0, 1):  # the first since the second plan was before
        restored.rebalance(every=3)
        assert restored.steps_since_plan[...].tolist() == [wanted]
    restored.rebalance()
    assert restored.steps_since_plan[...].tolist() == [0]


def test_few_calls_look_at_the_count():
    module, steps = nnx.Module(), _rebalance.StepsSincePlan(jnp.zeros((2, 1), jnp.int32))
    counts = [_rebalance.count_step(module, steps, every=4) for _ in range(4)]
    assert counts == [1, None, None, 4] and steps[...].tolist() == [[4], [4]]
    steps[...] = jnp.zeros((2, 1), jnp.int32)  # as after a plan
    assert [_rebalance.count_step(module, steps, every=4) for _ in range(3)] == [None, None, None]
    steps[...] = jnp.ones((2, 1), jnp.int32)  # as of a checkpoint
    assert [_rebalance.count_step(module, steps, every=4) for _ in range(3)] == [2, None, 4]
    assert [_rebalance.count_step(module, steps, every=6) for _ in range(2)] == [5, 6]


def test_state_and_models_that_do_not_fit(layer_of, on_cpus):
    sizes = dict(num_slots=np.int64(12), load_window=np.int16(3))
    layer = layer_of(make_mesh("reference", EP), "reference", **sizes)
    assert type(layer.num_slots) is int and layer.recorded_load[...].shape == (3, EXPERTS)
    by_expert = optax.GradientTransformation(
        lambda params: jax.tree.map(lambda p: p[:, :1, :1] if p.ndim == 3 else p, params), lambda *_: None
    )
    optimizer = nnx.Optimizer(layer, by_expert, wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"optimizer: expected state of its variable's shape .12, 16, 8., got shape"):
        layer.rebalance(optimizer)
    optimizer = nnx.Optimizer(layer, optax.flatten(optax.adam(1e-2)), wrt=nnx.Param)
    for every in (None, 1000):  # where the first call tells
        text = r"optimizer: expected state in trees of the shapes of the model's parameters, got .* \[4736\] at .*\.mu"
        with pytest.raises(ValueError, match=text):
            layer.rebalance(optimizer, every=every)
    with pytest.raises(ValueError, match="every: expected at least 1, got 0"):
        layer.rebalance(every=0)
    with pytest.raises(ValueError, match="model: expected one with this layer in it, got Linear without it"):
        layer.rebalance(optimizer, nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(Stack(layer), optax.sgd(1e-2, momentum=0.9), wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"model: expected that of the optimizer, got one without blocks\.0\.bias"):
        layer.rebalance(optimizer)


# ---- The router alone ----


def test_router_aux_is_what_numpy_says():
    router, x = Router(HIDDEN, EXPERTS, TOPK, score="sigmoid", rngs=nnx.Rngs(0)), tokens_of()
    topk_ids, weights, aux = nnx.jit(lambda router, x: router(x))(router, x)
    logits = np.asarray(x, np.float64) @ np.asarray(router.kernel[...], np.float64)
    scores = 1 / (1 + np.exp(-logits))
    assert topk_ids.dtype == jnp.int32 and weights.dtype == jnp.float32
    np.testing.assert_array_equal(topk_ids, np.argsort(-scores)[:, :TOPK])
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    load = np.bincount(np.ravel(topk_ids), minlength=EXPERTS) / topk_ids.size
    probability = (scores / scores.sum(-1, keepdims=True)).mean(0)
    np.testing.assert_allclose(aux.load, load, rtol=1e-5)
    np.testing.assert_allclose(aux.probability, probability, rtol=1e-4)
    np.testing.assert_allclose(aux.balance_loss, EXPERTS * (load * probability).sum(), rtol=1e-4)
    np.testing.assert_allclose(aux.z_loss, np.mean(np.log(np.exp(logits).sum(-1)) ** 2), rtol=1e-4)


def test_bias_moves_against_the_load():
    router = Router(HIDDEN, 4, TOPK, selection_bias=True, rngs=nnx.Rngs(0))
    router.update_bias(jnp.array([7, 1, 4, 4], jnp.int32), rate=0.25)
    np.testing.assert_array_equal(router.bias[...], [-0.25, 0.25, 0, 0])
    assert not nnx.to_pure_dict(nnx.state(router, nnx.Param)).keys() & {"bias"}


def test_bias_balances_the_load():
    router, x = Router(HIDDEN, EXPERTS, TOPK, selection_bias=True, rngs=nnx.Rngs(0)), tokens_of(shape=(256, HIDDEN))
    router.kernel[...] += jnp.linspace(-0.1, 0.1, EXPERTS) * jnp.sign(x.mean(0))[:, None]

    @nnx.jit
    def step(router):
        load = router(x)[2].load
        router.update_bias(load, 5e-3)
        return load.max() * EXPERTS

    busiest = [float(step(router)) for _ in range(60)]
    assert busiest[-1] < 1.25 < busiest[0]


def test_equal_scores_stay_within_the_best_groups():
    router = Router(HIDDEN, EXPERTS, 4, num_groups=4, topk_groups=2, selection_bias=True, rngs=nnx.Rngs(0))
    router.bias[...] = -jnp.arange(EXPERTS, dtype=jnp.float32) - 10  # below any mask with zeros
    topk_ids, _, _ = nnx.jit(lambda router, x: router(x))(router, jnp.zeros((3, HIDDEN)))
    np.testing.assert_array_equal(np.sort(topk_ids), [[0, 1, 2, 3]] * 3)


# ---- Errors, and what an import brings ----


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (dict(score="relu"), ValueError, 'score: expected "softmax" or "sigmoid", got \'relu\''),
        (dict(num_groups=3), ValueError, "num_groups: expected a divisor of the 8 experts, got 3"),
        (dict(num_groups=4, topk_groups=5), ValueError, "topk_groups: expected at most 4, the num_groups, got 5"),
        (dict(num_groups=8, topk_groups=1), ValueError, "topk: expected at most 1, the experts of topk_groups groups"),
        (dict(num_groups=2.0), TypeError, "num_groups: expected an int, got float 2.0"),
        (dict(param_dtype=jnp.int32), ValueError, "param_dtype: expected one of"),
        (dict(param_dtype=None), TypeError, "param_dtype: expected a dtype, one of"),
        (dict(scaling_factor="2"), TypeError, "scaling_factor: expected a number, got str '2'"),
    ],
)
def test_router_errors(arguments, error, text):
    with pytest.raises(error) as raised:
        Router(HIDDEN, EXPERTS, TOPK, rngs=nnx.Rngs(0), **arguments)
    assert text in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (dict(mesh=None), TypeError, "mesh: expected a jax.sharding.Mesh, or a communicator, got NoneType"),
        (dict(expert_axis="x"), ValueError, "expert_axis: expected one of ('dp', 'ep'), got 'x'"),
        (dict(data_axes="ep"), ValueError, "data_axes: expected distinct axes besides 'ep', got ('ep',)"),
        (dict(data_axes="x"), ValueError, "data_axes: expected names of ('dp', 'ep'), got 'x'"),
        (dict(tensor_axis="dp"), ValueError, "tensor_axis: expected one of the mesh's other axes (), got 'dp'"),
        (dict(data_axes=(), tensor_axis="dp", intermediate_size=7), ValueError, "a multiple of the 2 positions on"),
        (dict(max_tokens_per_rank=None), TypeError, "max_tokens_per_rank: expected an int, got NoneType None"),
        (dict(capacity_factor=0), ValueError, "capacity_factor: expected a positive number, got 0"),
        (dict(grouped_matmul=3), TypeError, "grouped_matmul: expected a callable, got int"),
        (dict(num_shared_experts=-1), ValueError, "num_shared_experts: expected at least 0, got -1"),
        (dict(router=nnx.Linear(2, 2, rngs=nnx.Rngs(0))), TypeError, "router: expected a Router, or a module with"),
        (dict(communicator=3, mesh=None), TypeError, "communicator: expected a MoECommunicator, got int"),
        (dict(dtype=jnp.int8), ValueError, "dtype: expected one of"),
        (dict(num_slots=7), ValueError, "num_slots: expected at least the 8 experts, got 7"),
        (dict(num_slots=9), ValueError, "num_slots: expected a multiple of the 2 ranks, got 9"),
        (dict(load_window=0), ValueError, "load_window: expected at least 1, got 0"),
        (dict(capacity_factor="1.5"), TypeError, "capacity_factor: expected a number, got str '1.5'"),
        (dict(capacity_factor=float("nan")), ValueError, "capacity_factor: expected a positive number, got nan"),
        (dict(data_axes=None), TypeError, "data_axes: expected the name of an axis or several, got NoneType"),
    ],
)
def test_layer_errors(on_cpus, arguments, error, text):
    router = Router(HIDDEN, EXPERTS, TOPK, rngs=nnx.Rngs(0))
    mesh = make_mesh("reference", DP_EP)
    defaults = dict(router=router, intermediate_size=INNER, mesh=mesh, max_tokens_per_rank=TOKENS, data_axes="dp")
    with pytest.raises(error) as raised:
        MoE(**(defaults | dict(implementation="reference", rngs=nnx.Rngs(0)) | arguments))
    assert text in str(raised.value)


def test_call_and_communicator_errors(layer_of, on_cpus):
    mesh = make_mesh("reference", DP_EP)
    layer = layer_of(mesh, "reference")
    for x, error, text in [
        (tokens_of(shape=(HIDDEN,)), ValueError, "x: expected shape [N, ..., 16], got shape [16]"),
        (tokens_of(shape=(4, HIDDEN + 1)), ValueError, "x: expected shape [N, ..., 16], got shape [4, 17]"),
        (tokens_of(shape=(6, HIDDEN)), ValueError, "x: expected a multiple of the 4 ranks in front, got 6"),
        (jnp.zeros((4, HIDDEN), jnp.int32), TypeError, "x: expected a floating dtype, got int32"),
        (3, TypeError, "x: expected an array, got int"),
    ]:
        with pytest.raises(error) as raised:
            layer(x)
        assert text in str(raised.value)
    router, rngs = Router(HIDDEN, EXPERTS, TOPK + 1, rngs=nnx.Rngs(0)), nnx.Rngs(0)
    with pytest.raises(ValueError, match="communicator: expected topk=3 of the router, got 2"):
        MoE(router, INNER, communicator=layer.communicator, rngs=rngs)
    with pytest.raises(ValueError, match="mesh: expected None beside communicator"):
        MoE(layer.router, INNER, communicator=layer.communicator, mesh=mesh, rngs=rngs)
    with pytest.raises(ValueError, match="dtype: expected float32, the communicator's, got bfloat16"):
        MoE(layer.router, INNER, communicator=layer.communicator, dtype=jnp.bfloat16, rngs=rngs)
    sizes = dict(num_experts=EXPERTS, hidden_size=HIDDEN, topk=TOPK, max_tokens_per_rank=TOKENS, axis_name="ep")
    slots = jax_ep.MoECommunicator(mesh, **sizes, mode=jax_ep.MoEMode.LOW_LATENCY, implementation="reference")
    with slots, pytest.raises(ValueError, match="communicator: expected output_layout FLAT, got"):
        MoE(layer.router, INNER, communicator=slots, rngs=rngs)
    with pytest.raises(ValueError, match="communicator: expected num_experts=12, the num_slots, got 8"):
        MoE(layer.router, INNER, communicator=layer.communicator, num_slots=12, rngs=rngs)
    for call in (layer.rebalance, lambda: layer.record_load(None)):
        with pytest.raises(ValueError, match="num_slots: expected a number of slots for re.*, got None"):
            call()
    with pytest.raises(ValueError, match=r"x: expected shape \[T, 16\], got shape \[2, 2, 16\]"):
        layer.router(jnp.zeros((2, 2, HIDDEN)))
    for x, text in ((jnp.zeros((2, HIDDEN), jnp.int32), "a floating dtype, got int32"), ([1.0], "an array, got list")):
        with pytest.raises(TypeError, match=f"x: expected {text}"):
            layer.router(x)
    with pytest.raises(TypeError, match="dtype: expected a dtype, one of .*, got 'nope'"):
        MoE(layer.router, INNER, communicator=layer.communicator, dtype="nope", rngs=rngs)
    slotted = layer_of(mesh, "reference", num_slots=12)
    with pytest.raises(TypeError, match="optimizer: expected an nnx.Optimizer, got int"):
        slotted.rebalance(3)
    with pytest.raises(TypeError, match="aux: expected a MoEAux, got int"):
        slotted.record_load(3)
    with pytest.raises(ValueError, match=r"load: expected shape \[8\], got shape \[2, 8\]"):
        Router(HIDDEN, EXPERTS, TOPK, selection_bias=True, rngs=rngs).update_bias(jnp.ones((2, EXPERTS)))
    with pytest.raises(ValueError, match="selection_bias: expected True for update_bias, got False"):
        layer.router.update_bias(jnp.ones(EXPERTS))


class Jittered(Router):
    def __init__(self, *arguments, rngs):
        super().__init__(*arguments, rngs=rngs)
        self.rngs = rngs

    def __call__(self, x):
        return super().__call__(x + jax.random.normal(self.rngs.noise(), x.shape, x.dtype))


def test_routers_that_keep_state_are_refused(on_cpus):
    """Each device would change a copy of its own, and all of them are lost."""
    router = Jittered(HIDDEN, EXPERTS, TOPK, rngs=nnx.Rngs(0, noise=1))
    arguments = dict(mesh=make_mesh("reference", EP), max_tokens_per_rank=TOKENS, implementation="reference")
    layer = MoE(router, INNER, **arguments, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="router: expected a module that its calls do not change"):
        layer(tokens_of())


def test_no_tokens(layer_of, native_implementation):
    for implementation in (native_implementation, "reference"):
        layer = layer_of(make_mesh(implementation, DP_EP), implementation)
        y, aux = nnx.jit(lambda layer, x: layer(x))(layer, jnp.zeros((0, HIDDEN), jnp.float32))
        assert y.shape == (0, HIDDEN) and not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(aux))


def test_import_brings_no_flax():
    script = "import sys, jax_ep; assert 'flax' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)

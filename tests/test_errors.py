"""What bad input gets: an error of the right type that names the argument, what was expected and what came."""

import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suite
from jax.sharding import PartitionSpec as P
from suite import EXPERT_MAJOR, FLAT, LOW_LATENCY, RANK_MAJOR, Case

import jax_ep
from jax_ep import DispatchLayout, MoECommunicator, MoECommunicatorConfig, MoEMode, QuantConfig, _ffi, _quant
from jax_ep.eplb import EplbCommunicator


def raises(error: type[Exception], argument: str, expected: str, got: str):
    return pytest.raises(
        error, match=f"^{re.escape(argument)}: expected .*{re.escape(expected)}.*got .*{re.escape(got)}"
    )


@pytest.fixture
def mesh(implementation):
    return suite.make_mesh(implementation, suite.num_ranks_at_most(implementation, 2))


@pytest.fixture
def case(mesh) -> Case:
    return Case(num_ranks=mesh.size, num_tokens=4, hidden_size=8, topk=2, num_experts=4)


@pytest.fixture
def comm(implementation, mesh, case):
    with suite.communicator(implementation, mesh, case) as comm:
        yield comm


# Construction.


@pytest.mark.parametrize(
    "error, argument, value, expected",
    [
        (ValueError, "axis_name", "experts", "one of ('ep',)"),
        (ValueError, "num_experts", 0, "at least 1"),
        (ValueError, "hidden_size", 0, "at least 1"),
        (ValueError, "topk", 0, "at least 1"),
        (ValueError, "topk", 33, "at most 32"),
        (ValueError, "max_tokens_per_rank", 0, "at least 1"),
        (ValueError, "max_recv_tokens_per_rank", 0, "at least 1"),
        (ValueError, "max_recv_tokens_per_rank", 2**31, "less than 2**31"),
        (ValueError, "hidden_size", 2**31, "less than 2**31"),
        (ValueError, "expert_alignment", 0, "at least 1"),
        (ValueError, "num_sms", 0, "at least 1"),
        (ValueError, "max_requests", -1, "at least 0"),
        (ValueError, "timeout_s", 0, "above 0"),
        (ValueError, "timeout_s", float("inf"), "up to"),
        (TypeError, "timeout_s", "30", "a number"),
        (TypeError, "timeout_s", None, "a number"),
        (TypeError, "timeout_s", True, "a number"),
        (ValueError, "overflow", "ignore", '"error" or "drop"'),
        (ValueError, "mode", "high_throughput", "a MoEMode"),
        (ValueError, "output_layout", "flat", "a DispatchLayout"),
        (ValueError, "output_layout", EXPERT_MAJOR, "FLAT or RANK_MAJOR in mode HIGH_THROUGHPUT"),
        (ValueError, "dtype", "int8", "'bfloat16', 'float16', 'float32', 'float64'"),
        (TypeError, "dtype", "float4", "one of ['bfloat16', 'float16', 'float32', 'float64']"),
        (TypeError, "dtype", None, "one of ['bfloat16', 'float16', 'float32', 'float64']"),
        (TypeError, "num_experts", 4.0, "an int"),
        (TypeError, "hidden_size", "8", "an int"),
        (TypeError, "topk", True, "an int"),
        (TypeError, "max_requests", 1.0, "an int"),
        (TypeError, "max_requests", True, "an int"),
    ],
)
def test_argument_of_the_constructor(implementation, mesh, case, error, argument, value, expected):
    with raises(error, argument, expected, str(value)):
        suite.communicator(implementation, mesh, case, **{argument: value})


@pytest.mark.parametrize(
    "argument, value, expected",
    [
        ("max_recv_tokens_per_rank", 8, "None with output_layout EXPERT_MAJOR"),
        ("expert_alignment", 2, "1 with output_layout EXPERT_MAJOR"),
        ("max_tokens_per_rank", 2**31 - 1, "fewer than 2**31 rows"),
    ],
)
def test_argument_of_the_constructor_beside_expert_major(implementation, mesh, case, argument, value, expected):
    case = dataclasses.replace(case, mode=LOW_LATENCY, layout=EXPERT_MAJOR)
    got = "" if argument == "max_tokens_per_rank" else str(value)
    if argument == "max_tokens_per_rank" and implementation == "cuda":  # where the mode's own limit is less
        expected = f"at most {2**16 // (2 * mesh.size)} in mode LOW_LATENCY on CUDA"
    with raises(ValueError, argument, expected, got):
        suite.communicator(implementation, mesh, case, **{argument: value})


def test_alignment_beside_rank_major(implementation, mesh, case):
    with raises(ValueError, "expert_alignment", "1 with output_layout RANK_MAJOR", "8"):
        suite.communicator(implementation, mesh, dataclasses.replace(case, layout=RANK_MAJOR), expert_alignment=8)


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("JAX_EP_NUM_SMS", "3,4", "1 integer, at least 1"),
        ("JAX_EP_NUM_SMS", "many", "1 integer"),
        ("JAX_EP_DISPATCH_BLOCKS", "24", "2 integers, separated by a comma, at least 1"),
        ("JAX_EP_COMBINE_BLOCKS", "0,24", "2 integers, separated by a comma, at least 1"),
    ],
)
def test_environment(mesh, case, monkeypatch, name, text, expected):
    monkeypatch.setenv(name, text)
    with raises(ValueError, name, expected, repr(text)):
        suite.communicator("reference", mesh, case)
    monkeypatch.setenv(name, "24,100" if "BLOCKS" in name else "24")
    with suite.communicator("reference", mesh, case) as comm:
        config = comm.config
        assert 24 in (config.num_sms, *(config.dispatch_blocks or ()), *(config.combine_blocks or ()))


def test_what_means_the_same_is_equal(mesh, case):
    """So that processes which write it differently agree."""
    given = [dict(dtype="float32", timeout_s=3), dict(dtype=jnp.float32, timeout_s=np.float64(3))]
    configs = []
    for arguments in given:
        with suite.communicator("reference", mesh, case, **arguments) as comm:
            configs.append(comm.config)
    assert configs[0] == configs[1] and str(configs[0]) == str(configs[1])


def test_mesh_without_a_device_of_this_process(mesh, case, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 7)
    for build in (lambda: suite.communicator("reference", mesh, case), lambda: EplbCommunicator(mesh)):
        with raises(ValueError, "mesh", "devices of this process, 7", "only such of processes [0]"):
            build()


def test_default_layouts(implementation, mesh, case):
    for mode, layout in ((MoEMode.HIGH_THROUGHPUT, FLAT), (MoEMode.LOW_LATENCY, EXPERT_MAJOR)):
        with suite.communicator(implementation, mesh, case, mode=mode, output_layout=None) as comm:
            assert comm.config.output_layout is layout
            flat = (comm.capacity,)
            assert comm.rows_shape == (flat if layout is FLAT else (comm.num_local_experts, 4 * comm.num_ranks))


def test_experts_that_cannot_be_shared_equally(implementation):
    mesh = suite.make_mesh(implementation, 2)
    with raises(ValueError, "num_experts", "a multiple of the 2 ranks", "5"):
        suite.communicator(implementation, mesh, Case(num_ranks=2, num_experts=5))


def test_unknown_implementation(mesh, case):
    with raises(ValueError, "implementation", 'one of "cuda", "cpu", "reference"', "'triton'"):
        suite.communicator("triton", mesh, case)


def test_implementation_of_another_platform(implementation, mesh, case):
    wrong, needed = ("cpu", "cpu") if implementation == "cuda" else ("cuda", "gpu")
    platform = mesh.devices.flat[0].platform
    with raises(ValueError, "mesh", f'{needed} devices for implementation="{wrong}"', platform):
        suite.communicator(wrong, mesh, case)


def test_installation_without_the_backend(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_ep._cuda", None)
    _ffi.extension.cache_clear()
    with pytest.raises(NotImplementedError, match="no jax_ep._cuda extension.*JAX_EP_CUDA=on.*reference"):
        _ffi.extension("cuda")


def test_rows_that_gpus_cannot_move():
    if suite.missing("cuda"):
        pytest.skip(suite.missing("cuda"))
    with raises(ValueError, "hidden_size", "rows of a multiple of 16 bytes on CUDA", "12 bytes"):
        suite.communicator("cuda", suite.make_mesh("cuda", 1), Case(num_ranks=1, hidden_size=3))


def test_mesh_of_another_type(case):
    with raises(TypeError, "mesh", "a jax.sharding.Mesh", "list"):
        suite.communicator("cpu", jax.devices(), case)


def test_config_beside_other_arguments(mesh):
    config = MoECommunicatorConfig(num_experts=4, hidden_size=8, topk=2, max_tokens_per_rank=4)
    with raises(TypeError, "config", "one MoECommunicatorConfig and no other argument", "['topk']"):
        MoECommunicator(mesh, config, topk=1)


def test_config_of_another_type(mesh):
    with raises(TypeError, "config", "one MoECommunicatorConfig", "dict"):
        MoECommunicator(mesh, {"topk": 2})


def test_sizes_of_numpy(mesh):
    """As computed from data; kept as ints, which are the same for all processes and do not overflow."""
    with MoECommunicator(
        mesh,
        num_experts=np.int32(4 * mesh.size),
        hidden_size=np.int64(8),
        topk=np.uint8(2),
        max_tokens_per_rank=np.int16(3),
        dispatch_blocks=(np.int32(1), np.int32(2)),
        implementation="reference",
    ) as comm:
        config = comm.config
        sizes = config.num_experts, config.hidden_size, config.topk, config.max_tokens_per_rank, *config.dispatch_blocks
        assert all(type(size) is int for size in sizes)


def test_config_alone(implementation, mesh):
    config = MoECommunicatorConfig(
        num_experts=4, hidden_size=8, topk=2, max_tokens_per_rank=4, implementation=implementation
    )
    with MoECommunicator(mesh, config) as comm:
        assert comm.config.output_layout is FLAT
        assert (comm.num_ranks, comm.num_local_experts) == (mesh.size, 4 // mesh.size)
        assert comm.capacity == mesh.size * 4 * 2


# Calls.


def on_each_rank(comm, f):
    return jax.jit(jax.shard_map(f, mesh=comm.mesh, in_specs=(), out_specs=P("ep")))()


def arguments(**overrides) -> dict:
    """One rank's valid arguments of dispatch."""
    valid = dict(
        x=jnp.ones((4, 8), jnp.float32), topk_ids=jnp.zeros((4, 2), jnp.int32), weights=jnp.ones((4, 2), jnp.float32)
    )
    return valid | overrides


@pytest.mark.parametrize(
    "error, argument, value, expected, got",
    [
        (TypeError, "x", np.ones((4, 8), np.float16), "dtype float32", "float16"),
        (ValueError, "x", np.ones((4, 7), np.float32), "shape [T, 8]", "shape [4, 7]"),
        (ValueError, "x", np.ones((1, 4, 8), np.float32), "shape [T, 8]", "shape [1, 4, 8]"),
        (ValueError, "x", np.ones((5, 8), np.float32), "at most 4 tokens", "5"),
        (TypeError, "x", [[1.0] * 8], "an array", "list"),
        (TypeError, "topk_ids", np.ones((4, 2), np.int16), "dtype int32", "int16"),
        (TypeError, "topk_ids", np.ones((4, 2), np.float32), "dtype int32", "float32"),
        (ValueError, "topk_ids", np.ones((4, 3), np.int32), "shape [4, 2]", "shape [4, 3]"),
        (ValueError, "topk_ids", np.ones((3, 2), np.int32), "shape [4, 2]", "shape [3, 2]"),
        (ValueError, "topk_ids", np.ones(4, np.int32), "shape [4, 2]", "shape [4]"),
        (ValueError, "topk_ids", None, "an array, or previous_handle", "neither"),
        (TypeError, "weights", np.ones((4, 2), np.float16), "dtype float32", "float16"),
        (ValueError, "weights", np.ones((4, 1), np.float32), "shape [4, 2]", "shape [4, 1]"),
        (TypeError, "previous_handle", 3, "a DispatchHandle", "int"),
    ],
)
def test_argument_of_dispatch(comm, error, argument, value, expected, got):
    given = arguments(**{argument: value})
    if argument == "previous_handle":
        del given["topk_ids"]
    with raises(error, argument, expected, got):
        on_each_rank(comm, lambda: comm.dispatch(**given)[0].tokens)


INT8 = dict(dtype="int8", block_size=4)


@pytest.mark.parametrize(
    "error, argument, value, expected, got",
    [
        (TypeError, "quant", "float8_e4m3fn", "a QuantConfig", "str"),
        (ValueError, "quant.dtype", dict(dtype=jnp.float16), "'float8_e4m3fn', 'float8_e5m2', 'int8'", "float16"),
        (TypeError, "quant.dtype", dict(dtype="float4"), "a dtype, one of ['float8_e4m3fn'", "'float4'"),
        (ValueError, "quant.scale_dtype", dict(scale_dtype=jnp.bfloat16), "'float32', 'float8_e8m0fnu'", "bfloat16"),
        (ValueError, "quant.block_size", dict(), "a divisor of the hidden size 32", "128"),
        (ValueError, "quant.block_size", dict(block_size=12), "a divisor of the hidden size 32", "12"),
        (ValueError, "quant.block_size", dict(block_size=0), "at least 1", "0"),
        (ValueError, "quant.block_size", dict(block_size=1), "at most the 96 bytes", "1, 128 bytes"),
        (TypeError, "quant.block_size", dict(block_size=4.0), "an int", "float 4.0"),
        (TypeError, "quant.scales", INT8 | dict(scales=1.0), "an array", "float"),
        (ValueError, "quant.scales", INT8 | dict(scales=np.ones(4, np.float32)), "shape [4, 8]", "shape [4]"),
        (ValueError, "quant.scales", INT8 | dict(scales=np.ones((4, 2), np.float32)), "shape [4, 8]", "shape [4, 2]"),
        (TypeError, "quant.scales", INT8 | dict(scales=np.ones((4, 8), np.float16)), "dtype float32", "float16"),
        (TypeError, "x", INT8 | dict(block_size=8), "dtype float32", "int8"),
        (TypeError, "x", dict(block_size=8, scales=np.ones((4, 4), np.float32)), "dtype float8_e4m3fn", "int8"),
    ],
)
def test_argument_of_a_quantised_dispatch(implementation, mesh, case, error, argument, value, expected, got):
    quant = QuantConfig(**value) if isinstance(value, dict) else value
    with suite.communicator(implementation, mesh, dataclasses.replace(case, hidden_size=32)) as comm:
        given = arguments(x=jnp.ones((4, 32), jnp.int8), quant=quant)
        with raises(error, argument, expected, got):
            on_each_rank(comm, lambda: comm.dispatch(**given)[0].tokens)


@pytest.mark.parametrize(
    "argument, given, expected",
    [("max_tokens_per_rank", 40000, "at most 32768"), ("num_experts", 20000, "at most 16384")],
)
def test_more_than_gpus_take_in_low_latency_mode(argument, given, expected):
    if suite.missing("cuda"):
        pytest.skip(suite.missing("cuda"))
    case = Case(num_ranks=1, topk=2, mode=MoEMode.LOW_LATENCY, layout=suite.EXPERT_MAJOR)
    with raises(ValueError, argument, f"{expected} in mode LOW_LATENCY on CUDA", str(given)):
        suite.communicator("cuda", suite.make_mesh("cuda", 1), case, **{argument: given})


def test_quantised_rows_that_gpus_cannot_move():
    if suite.missing("cuda"):
        pytest.skip(suite.missing("cuda"))
    with suite.communicator("cuda", suite.make_mesh("cuda", 1), Case(num_ranks=1, hidden_size=16)) as comm:
        given = arguments(x=jnp.ones((4, 16), jnp.float32), quant=QuantConfig(block_size=16))
        with raises(ValueError, "quant", "a hidden size of a multiple of 32 on CUDA", "16"):
            on_each_rank(comm, lambda: comm.dispatch(**given)[0].tokens)


@pytest.mark.parametrize("layout", DispatchLayout, ids=suite.arrangement_id)
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_gradients_of_quantised_tokens(implementation, mesh, case, layout, dtype):
    """Which stand for nothing without their scales: neither has one, but by way of dequantize."""
    quant = QuantConfig(dtype=dtype, block_size=16)
    case = dataclasses.replace(case, hidden_size=32, mode=LOW_LATENCY, layout=layout)
    with suite.communicator(implementation, mesh, case) as comm:

        def loss(x):
            given = arguments(quant=quant) | dict(x=x)
            out, handle = comm.dispatch(**given)
            scales = jnp.repeat(out.quant.scales, 16, axis=-1)
            return comm.combine(out.tokens.astype(jnp.float32) * scales, handle).sum()

        def gradient():
            return jax.grad(loss)(jax.lax.pcast(jnp.ones((4, 32), jnp.float32), "ep", to="varying"))

        with raises(TypeError, "tokens", "a gradient by way of jax_ep.dequantize(out)", "quantised tokens"):
            on_each_rank(comm, gradient)


def test_dequantize_of_something_else(comm):
    with raises(TypeError, "out", "a DispatchOutput", "tuple"):
        on_each_rank(comm, lambda: jax_ep.dequantize(comm.dispatch(**arguments())))


def test_dequantize_of_plain_rows(comm):
    with raises(ValueError, "out", "the output of a dispatch with quant", "plain rows"):
        on_each_rank(comm, lambda: jax_ep.dequantize(comm.dispatch(**arguments())[0]))


def test_quant_config_as_a_static_argument_and_as_a_pytree():
    assert len({QuantConfig(), QuantConfig(block_size=32), QuantConfig()}) == 2
    x = jnp.ones((4, 32), jnp.float32)
    quantize = jax.jit(_quant.quantize, static_argnums=1)
    scales = quantize(x, QuantConfig(block_size=16))[1]
    config = jax.jit(lambda config: config)(QuantConfig(block_size=16, scales=scales))
    assert config.block_size == 16
    suite.assert_same(config.scales, scales)


def test_devices_in_another_order(native_implementation, case):
    """Which tracing cannot tell: axes have the same names and sizes. The reference's ranks go by the axis."""
    if len(suite.devices_of(native_implementation)) < 2:
        pytest.skip("needs 2 devices")
    mesh = suite.make_mesh(native_implementation, 2)
    other = jax.sharding.Mesh(mesh.devices[::-1], mesh.axis_names, axis_types=mesh.axis_types)
    with suite.communicator(native_implementation, mesh, dataclasses.replace(case, num_ranks=2)) as comm:

        def layer(x):
            out, handle = comm.dispatch(**arguments(x=x))
            return comm.combine(out.tokens, handle)

        def on(mesh):
            x = jax.device_put(np.ones((8, 8), np.float32), jax.NamedSharding(mesh, P("ep")))
            return jax.shard_map(layer, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")), x

        def called(mesh):
            mapped, x = on(mesh)
            return jax.jit(mapped)(x)

        def differentiated(mesh):
            mapped, x = on(mesh)
            return jax.jit(jax.grad(lambda x: mapped(x).sum()))(x)

        ids = tuple(device.id for device in mesh.devices.flat)
        for call in (called, differentiated):
            assert np.isfinite(call(mesh)).all()
            expected = f"shard_map over the communicator's devices {ids}"
            with raises(ValueError, "jax_ep_dispatch", expected, str(ids[::-1])):
                call(other)


def test_stacked_handles(comm):
    def combined():
        def step(carry, _):
            return carry, comm.dispatch(**arguments())[1]

        _, handle = jax.lax.scan(step, None, length=2)
        return comm.combine(jnp.ones((comm.capacity, 8), jnp.float32), handle)

    with raises(ValueError, "handle.num_dropped", "shape []", "shape [2]"):
        on_each_rank(comm, combined)


def test_topk_ids_beside_previous_handle(comm):
    def layer():
        _, handle = comm.dispatch(**arguments())
        comm.dispatch(**arguments(), previous_handle=handle)

    with raises(ValueError, "topk_ids", "None beside previous_handle", "an array"):
        on_each_rank(comm, layer)


def test_previous_handle_of_another_number_of_tokens(comm):
    def layer():
        _, handle = comm.dispatch(**arguments())
        comm.dispatch(jnp.ones((3, 8), jnp.float32), previous_handle=handle)

    with raises(ValueError, "x", "4 tokens", "3"):
        on_each_rank(comm, layer)


@pytest.mark.parametrize(
    "error, change, expected, got",
    [
        (TypeError, lambda y: y.astype(jnp.bfloat16), "dtype float32", "bfloat16"),
        (ValueError, lambda y: y[:-1], "shape [{capacity}, 8]", "shape [{less}, 8]"),
        (ValueError, lambda y: y[:, :-1], "shape [{capacity}, 8]", "shape [{capacity}, 7]"),
        (TypeError, lambda y: None, "an array", "NoneType"),
    ],
    ids=["dtype", "rows", "hidden_size", "type"],
)
def test_argument_of_combine(comm, error, change, expected, got):
    sizes = dict(capacity=comm.capacity, less=comm.capacity - 1)

    def layer():
        out, handle = comm.dispatch(**arguments())
        return comm.combine(change(out.tokens), handle)

    with raises(error, "y", expected.format(**sizes), got.format(**sizes)):
        on_each_rank(comm, layer)


def test_handle_of_another_type(comm):
    def layer():
        out, _ = comm.dispatch(**arguments())
        return comm.combine(out.tokens, out)

    with raises(TypeError, "handle", "a DispatchHandle", "DispatchOutput"):
        on_each_rank(comm, layer)


@pytest.mark.parametrize("argument", ["handle", "previous_handle"])
def test_handle_of_another_communicator(implementation, mesh, case, comm, argument):
    with suite.communicator(implementation, mesh, case) as other:

        def layer():
            out, handle = other.dispatch(**arguments())
            return (
                comm.combine(out.tokens, handle)
                if argument == "handle"
                else comm.dispatch(out.tokens[:4], previous_handle=handle)
            )

        with raises(ValueError, argument, "a handle of this communicator", "another communicator's"):
            on_each_rank(comm, layer)


def test_requests_of_a_communicator_without_room_for_any(comm):
    def start_dispatch():
        comm.dispatch_async(**arguments())

    def start_combine():
        out, handle = comm.dispatch(**arguments())
        comm.combine_async(out.tokens, handle)

    for start, op in ((start_dispatch, "dispatch_async"), (start_combine, "combine_async")):
        with raises(ValueError, "max_requests", f"at least 1 for {op}", "0"):
            on_each_rank(comm, start)


def test_arguments_of_requests(implementation, mesh, case):
    with suite.communicator(implementation, mesh, case, max_requests=1) as comm:
        with raises(ValueError, "weights", "shape [4, 2]", "shape [4, 1]"):
            on_each_rank(comm, lambda: comm.dispatch_async(**arguments(weights=jnp.ones((4, 1), jnp.float32))))
        with raises(TypeError, "handle", "a DispatchHandle", "DispatchRequest"):
            on_each_rank(comm, lambda: comm.combine_async(None, comm.dispatch_async(**arguments())))
        with raises(ValueError, "dispatch_async", "a call inside jax.shard_map over mesh axis 'ep'", "manual axes ()"):
            comm.dispatch_async(**arguments())
        with raises(ValueError, "combine_async", "a call inside jax.shard_map over mesh axis 'ep'", "manual axes ()"):
            comm.combine_async(None, None)


def test_call_outside_shard_map(comm):
    with raises(ValueError, "dispatch", "a call inside jax.shard_map over mesh axis 'ep'", "manual axes ()"):
        comm.dispatch(**arguments())
    with raises(ValueError, "dispatch", "a call inside jax.shard_map over mesh axis 'ep'", "manual axes ()"):
        jax.jit(comm.dispatch)(**arguments())


def test_shard_map_over_another_mesh(implementation, mesh, comm):
    other = suite.make_mesh(implementation, 1, dp=mesh.size) if mesh.size > 1 else suite.make_mesh("reference", 2)
    layer = jax.shard_map(lambda: comm.dispatch(**arguments())[0].tokens, mesh=other, in_specs=(), out_specs=P())
    with raises(ValueError, "dispatch", f"shard_map over the communicator's mesh (('ep', {mesh.size}),)", "mesh"):
        jax.jit(layer)()


# Lifetime.


def step_and_inputs(comm, case: Case):
    return suite.make_step(comm, case), suite.place(suite.draw(case), comm.mesh, comm.capacity)


def assert_works(comm, case: Case) -> None:
    step, inputs = step_and_inputs(comm, case)
    suite.assert_dense(case, suite.draw(case), jax.block_until_ready(step(inputs)))


def test_trace_after_destroy(implementation, mesh, case):
    comm = suite.communicator(implementation, mesh, case)
    comm.destroy()
    comm.destroy()
    with raises(ValueError, "dispatch", "a live MoECommunicator", "one after destroy()"):
        on_each_rank(comm, lambda: comm.dispatch(**arguments())[0].tokens)
    with raises(ValueError, "combine", "a live MoECommunicator", "one after destroy()"):
        on_each_rank(comm, lambda: comm.combine(None, None))


def test_wait_outside_shard_map_and_after_destroy(implementation, mesh, case):
    comm, requests = suite.communicator(implementation, mesh, case, max_requests=2), []

    def start():
        out, handle = comm.dispatch(**arguments())
        requests[:] = comm.dispatch_async(**arguments()), comm.combine_async(out.tokens, handle)
        return out.tokens

    on_each_rank(comm, start)
    for request in requests:
        with raises(ValueError, "wait", "a call inside jax.shard_map over mesh axis 'ep'", "manual axes ()"):
            request.wait()
    comm.destroy()
    for request in requests:
        with raises(ValueError, "wait", "a live MoECommunicator", "one after destroy()"):
            on_each_rank(comm, request.wait)


def test_vmap_is_refused(native_implementation):
    """Calls of several devices cannot be put into one by those who see one device."""
    mesh = suite.make_mesh(native_implementation, suite.num_ranks_at_most(native_implementation, 2))
    case = Case(num_ranks=mesh.size)
    with suite.communicator(native_implementation, mesh, case) as comm:
        step, inputs = step_and_inputs(comm, case)
        with pytest.raises(NotImplementedError, match="vmap"):
            jax.vmap(step)(jax.tree.map(lambda x: jnp.stack([x, x]), inputs))


def test_compiled_program_after_destroy(native_implementation):
    mesh = suite.make_mesh(native_implementation, suite.num_ranks_at_most(native_implementation, 2))
    case = Case(num_ranks=mesh.size)
    with suite.communicator(native_implementation, mesh, case) as comm:
        step, inputs = step_and_inputs(comm, case)
        jax.block_until_ready(step(inputs))
    with pytest.raises(jax.errors.JaxRuntimeError, match="the MoECommunicator of this program was destroyed"):
        jax.block_until_ready(step(inputs))


def test_communicators_beside_and_after_each_other(implementation, mesh, case):
    with suite.communicator(implementation, mesh, case) as first:
        with suite.communicator(implementation, mesh, case) as second:
            assert_works(second, case)
        assert_works(first, case)
    with suite.communicator(implementation, mesh, case) as third:
        assert_works(third, case)


def test_an_exception_inside_the_context_destroys(implementation, mesh, case):
    with pytest.raises(KeyError), suite.communicator(implementation, mesh, case) as comm:
        raise KeyError
    with raises(ValueError, "dispatch", "a live MoECommunicator", "one after destroy()"):
        on_each_rank(comm, lambda: comm.dispatch(**arguments())[0].tokens)


def test_arena(native_implementation):
    mesh = suite.make_mesh(native_implementation, 1)
    comm = suite.communicator(native_implementation, mesh, Case(num_ranks=1))
    assert comm.arena_bytes >= 0
    comm.destroy()
    assert comm.arena_bytes == 0


def test_errors_are_runtime_errors():
    for error in (jax_ep.CapacityError, jax_ep.ExpertIdError, jax_ep.PeerTimeoutError):
        assert issubclass(error, RuntimeError)

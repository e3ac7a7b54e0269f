"""Errors that users read: each names the argument, what was expected and what came."""

from __future__ import annotations

import numbers

import jax
import jax.numpy as jnp
import numpy as np


def expect(condition: bool, argument: str, expected: str, got) -> None:
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {got}")


def expect_int(argument: str, value, minimum: int = 1) -> int:
    """`value`, which may be one of numpy's integers, as an int: that is what is to be kept and reckoned with."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{argument}: expected an int, got {type(value).__name__} {value!r}")
    value = int(value)
    expect(value >= minimum, argument, f"at least {minimum}", value)
    return value


def expect_number(argument: str, value) -> float:
    """`value`, an int or a float, also one of numpy's, as a float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{argument}: expected a number, got {type(value).__name__} {value!r}")
    return float(value)


def _expect_some_array(argument: str, value) -> None:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{argument}: expected an array, got {type(value).__name__}")


def expect_array(argument: str, value, shape: tuple[int | str, ...], dtype) -> None:
    """Letters in `shape` stand for any size."""
    _expect_some_array(argument, value)
    wanted = f"shape [{', '.join(map(str, shape))}]"
    fits = len(value.shape) == len(shape) and all(
        isinstance(size, str) or size == got for size, got in zip(shape, value.shape, strict=True)
    )
    expect(fits, argument, wanted, f"shape {list(value.shape)}")
    if value.dtype != jnp.dtype(dtype):
        raise TypeError(f"{argument}: expected dtype {jnp.dtype(dtype).name}, got {value.dtype}")


def expect_floating(argument: str, value) -> None:
    """An array of any shape."""
    _expect_some_array(argument, value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{argument}: expected a floating dtype, got {value.dtype}")


def expect_dtype(argument: str, value, allowed) -> jnp.dtype:
    """`value` as a dtype, whose name must be among `allowed`."""
    try:
        if value is None:  # which numpy takes for float64
            raise TypeError
        dtype = jnp.dtype(value)
    except TypeError:
        raise TypeError(f"{argument}: expected a dtype, one of {sorted(allowed)}, got {value!r}") from None
    expect(dtype.name in allowed, argument, f"one of {sorted(allowed)}", dtype.name)
    return dtype


def expect_mesh(mesh) -> None:
    """A mesh of devices, of which this process has some."""
    if not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(f"mesh: expected a jax.sharding.Mesh of devices, got {type(mesh).__name__}")
    me, processes = jax.process_index(), sorted({device.process_index for device in mesh.devices.flat})
    expect(me in processes, "mesh", f"devices of this process, {me}", f"only such of processes {processes}")


def expect_inside_shard_map(mesh: jax.sharding.Mesh, axis_name: str, op: str) -> None:
    """The traced code must run per device of the communicator's own mesh."""
    current = jax.sharding.get_abstract_mesh()
    if axis_name not in current.manual_axes:
        raise ValueError(
            f"{op}: expected a call inside jax.shard_map over mesh axis {axis_name!r}, got a call with manual axes "
            f"{tuple(current.manual_axes)}"
        )
    theirs = tuple(zip(current.axis_names, current.axis_sizes, strict=True))
    ours = tuple(zip(mesh.axis_names, mesh.devices.shape, strict=True))
    expect(theirs == ours, op, f"shard_map over the communicator's mesh {ours}", f"mesh {theirs}")


def expect_concrete(argument: str, array) -> None:
    if isinstance(array, jax.core.Tracer):
        raise TypeError(f"{argument}: expected a concrete array, got a tracer; call it outside jax.jit")

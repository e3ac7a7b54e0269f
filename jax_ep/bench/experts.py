"""Times what lies between dispatch and combine: the experts' grouped matrix product, beside a dense one."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_ep.bench.problem import on_host
from jax_ep.bench.results import Product, first_line
from jax_ep.bench.timing import AXIS, measure
from jax_ep.bench.verify import WrongResult
from jax_ep.bench.workloads import Workload

DTYPE = jnp.bfloat16
# An element may be off by this share of its own magnitude and of the standard deviation of such an element: a backend
# sums in float32, in an order of its own, and rounds once, to within 2^-9. A product with a wrong row is off by more.
TOLERANCE = 2.0**-7
_DIRECTIONS = "forward", "forward + backward"
_RAGGED_DOT, _TOKAMAX, _DENSE = "jax.lax.ragged_dot", "tokamax.ragged_dot", "dense matmul"

# (rows [C, X], kernels [L, X, Y], group_sizes int32 [L]) -> [C, Y]
Matmul = Callable[..., jax.Array]


def backends() -> dict[str, Matmul]:
    """Those of `jax_ep.nn`: tokamax's where it, and Flax for `jax_ep.nn`, are installed, on any device."""
    found: dict[str, Matmul] = {_RAGGED_DOT: jax.lax.ragged_dot}
    try:
        from jax_ep.nn._matmul import default_grouped_matmul
    except ImportError:
        return found
    on_gpus = default_grouped_matmul("cuda")
    return found if on_gpus is jax.lax.ragged_dot else found | {_TOKAMAX: on_gpus}


@dataclasses.dataclass(frozen=True)
class Case:
    direction: str
    backend: str
    groups: str

    @property
    def name(self) -> str:
        groups = f", {self.groups} groups" if self.groups else ""
        return f"{self.backend}{groups}, {self.direction}"


def cases(only: str | None) -> list[Case]:
    """Whose names contain `only`, in each direction after the dense one that they are compared with."""
    chosen: list[Case] = []
    for direction in _DIRECTIONS:
        grouped = [Case(direction, backend, groups) for backend in backends() for groups in ("even", "skewed")]
        grouped = [case for case in grouped if only is None or only in case.name]
        chosen += [Case(direction, _DENSE, ""), *grouped] if grouped else []
    return chosen


class Experts:
    """One layer of one rank's experts: normal values, and the rows that balanced routing brings it.

    Rows lie in an array that has room for more, as in what dispatch returns.
    """

    def __init__(self, mesh: Mesh, workload: Workload, num_groups: int):
        self._mesh, self._workload = mesh, workload
        self.num_rows, hidden, inner = workload.rows_per_rank, workload.hidden_size, workload.intermediate_size
        self.group_sizes = {
            "even": even_groups(self.num_rows, num_groups),
            "skewed": skewed_groups(self.num_rows, num_groups, workload.zipf_exponent or 1.0),
            "": np.array([self.num_rows], np.int32),
        }
        self._rows = self._normal((workload.capacity, hidden), seed=0)
        self._kernels = self._normal((num_groups, hidden, inner), seed=1)
        self._gradients = self._normal((workload.capacity, inner), seed=2)

    @property
    def description(self) -> dict[str, Any]:
        return dict(
            workload=self._workload.name,
            num_rows=self.num_rows,
            array_rows=self._rows.shape[0],
            kernels_shape=self._kernels.shape,
            dtype=jnp.dtype(DTYPE).name,
            group_sizes={name: sizes.tolist() for name, sizes in self.group_sizes.items() if name},
            tolerance=TOLERANCE,
            tokamax=importlib.metadata.version("tokamax") if _TOKAMAX in backends() else None,
        )

    def measure(self, case: Case) -> Product:
        rows, kernels, gradients = self._rows, self._kernels, self._gradients
        if case.backend == _DENSE:
            matmul: Matmul = _dense
            rows, kernels, gradients = rows[: self.num_rows], kernels[:1], gradients[: self.num_rows]
        else:
            matmul = backends()[case.backend]
        sizes = self.group_sizes[case.groups]
        fixed, num_products, op = [kernels, self._put(sizes)], 1, functools.partial(_forward, matmul)
        if case.direction != "forward":
            fixed, num_products, op = [*fixed, gradients], 3, functools.partial(_forward_and_backward, matmul)

        def verify(results) -> None:
            wrong = int(on_host(num_wrong(results, rows, kernels, gradients, sizes, largest_group=int(sizes.max()))))
            if wrong:
                raise WrongResult(f"{case.name}: {wrong} elements are wrong")

        flops = 2 * num_products * self.num_rows * kernels.shape[1] * kernels.shape[2]
        try:
            return Product(case.name, flops, measure(op, self._mesh, rows, fixed, verify=verify), None)
        except Exception as failure:  # the others are worth having
            return Product(case.name, flops, None, first_line(failure))

    def _normal(self, shape: tuple[int, ...], seed: int) -> jax.Array:
        make = jax.jit(lambda key: jax.random.normal(key, shape, DTYPE), out_shardings=self._sharding)
        return make(jax.random.key(seed))

    def _put(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, self._sharding)

    @property
    def _sharding(self) -> NamedSharding:
        return NamedSharding(self._mesh, PartitionSpec(AXIS))


def measure_experts(experts: Experts, only: str | None = None) -> Iterator[Product]:
    """`cases(only)`, each beside the dense product of its direction."""
    for case in cases(only):
        product = experts.measure(case)
        if case.backend == _DENSE:
            dense = product
            yield product
        else:
            yield dataclasses.replace(product, dense_times=dense.times)


def even_groups(num_rows: int, num_groups: int) -> np.ndarray:
    """int32 `[num_groups]`, which differ by one at most."""
    return np.diff(np.arange(num_groups + 1) * num_rows // num_groups).astype(np.int32)


def skewed_groups(num_rows: int, num_groups: int, zipf_exponent: float, seed: int = 0) -> np.ndarray:
    """int32 `[num_groups]`: each row has a group drawn by Zipf's law."""
    rng = np.random.default_rng(seed)
    popularity = np.arange(1, num_groups + 1, dtype=np.float64) ** -zipf_exponent
    return rng.multinomial(num_rows, rng.permutation(popularity / popularity.sum())).astype(np.int32)


def _dense(rows, kernels, group_sizes):
    return rows @ jax.lax.squeeze(kernels, [0])


def _forward(matmul: Matmul, rows, kernels, group_sizes):
    return (matmul(rows, kernels, group_sizes),)


def _forward_and_backward(matmul: Matmul, rows, kernels, group_sizes, gradients):
    out, pull = jax.vjp(lambda rows, kernels: matmul(rows, kernels, group_sizes), rows, kernels)
    return out, *pull(gradients)


@functools.partial(jax.jit, static_argnames="largest_group")
def num_wrong(results, rows, kernels, gradients, group_sizes, *, largest_group: int) -> jax.Array:
    """How many elements of a product, and of its gradients in rows and kernels if given, are not those of a loop over
    the groups in float32. What lies beyond all groups may hold anything.

    Operands are normal values, so a sum of n products has a standard deviation of sqrt(n).
    """
    results = dict(zip(("out", "rows", "kernels"), results))  # noqa: B905
    group_sizes = jnp.asarray(group_sizes, jnp.int32)
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    contract = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def add_group(i, count):
        # A window that is as large for every group, and lies within the array.
        window = jnp.minimum(ends[i] - group_sizes[i], rows.shape[0] - largest_group)
        row = window + jnp.arange(largest_group, dtype=jnp.int32)
        in_group = (row >= ends[i] - group_sizes[i]) & (row < ends[i])

        def part(array):
            slice_ = jax.lax.dynamic_slice_in_dim(array, window, largest_group)
            return jnp.where(in_group[:, None], slice_, jnp.zeros((), array.dtype)).astype(jnp.float32)

        x, gradient, kernel = part(rows), part(gradients), kernels[i].astype(jnp.float32)
        count += _num_far(part(results["out"]), contract(x, kernel), kernel.shape[0])
        if "rows" in results:
            count += _num_far(part(results["rows"]), contract(gradient, kernel.T), kernel.shape[1])
            got = results["kernels"][i].astype(jnp.float32)
            count += _num_far(got, contract(x.T, gradient), group_sizes[i])
        return count

    return jax.lax.fori_loop(0, group_sizes.size, add_group, jnp.int32(0))


def _num_far(got, want, num_terms) -> jax.Array:
    """A NaN is far from everything."""
    deviation = jnp.sqrt(jnp.asarray(num_terms, jnp.float32))
    return jnp.sum(~(jnp.abs(got - want) <= TOLERANCE * (jnp.abs(want) + deviation)), dtype=jnp.int32)

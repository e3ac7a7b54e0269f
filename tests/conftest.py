"""Devices, strictness, and the implementations that the suite runs with.

Environment:
  JAX_EP_REQUIRE=cuda: tests with an `implementation` run on GPUs alone, and fail where there is none.
  JAX_EP_EXAMPLES: random cases per property; the default keeps a run short on two cores.
"""

import os

# Before jax is imported, and for the processes that tests start. XLA_FLAGS of the caller come last, and count.
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"
if not os.path.exists("/dev/nvidia0"):
    # Compiling is most of a run on CPUs: what runs once need not be fast.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Processes that tests start share the GPUs with this one.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import hypothesis
import jax
import pytest
import suite

REQUIRED = os.environ.get("JAX_EP_REQUIRE")

jax.config.update("jax_numpy_dtype_promotion", "strict")

hypothesis.settings.register_profile(
    "jax_ep",
    max_examples=int(os.environ.get("JAX_EP_EXAMPLES", "10")),
    derandomize=True,
    database=None,
    deadline=None,
    # Not shrinking: every example compiles two programs.
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("jax_ep")


def _usable(implementation: str) -> str:
    missing = suite.missing(implementation)
    if missing and REQUIRED == implementation:
        pytest.fail(f"JAX_EP_REQUIRE={REQUIRED}: {missing}")
    if missing:
        pytest.skip(missing)
    return implementation


@pytest.fixture(params=["cuda"] if REQUIRED == "cuda" else ["reference", "cpu", "cuda"])
def implementation(request) -> str:
    return _usable(request.param)


@pytest.fixture(params=["cuda"] if REQUIRED == "cuda" else ["cpu", "cuda"])
def native_implementation(request) -> str:
    """Those with code of their own, where a test shows nothing of the reference."""
    return _usable(request.param)


def _shared_memory_files() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


@pytest.fixture
def shared_memory_files():
    return _shared_memory_files


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_in_shared_memory():
    before = _shared_memory_files()
    yield
    assert _shared_memory_files() <= before

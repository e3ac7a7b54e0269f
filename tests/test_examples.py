"""The code that users start from runs as it is printed."""

import pathlib
import re
import sys

import pytest
from commands import ROOT, run

TIMEOUT_S = 240


def run_python(implementation: str, directory: pathlib.Path, *arguments) -> str:
    """Runs it as users would, with warnings as errors, and returns what it printed."""
    platforms = dict(JAX_PLATFORMS="cpu") if implementation == "cpu" else {}
    return run(sys.executable, "-W", "error", *arguments, cwd=directory, timeout_s=TIMEOUT_S, **platforms)


def test_train_moe_lm(native_implementation, tmp_path):
    sizes = "--steps 2 --batch 8 --seq-len 32 --layers 1 --hidden 64".split()
    output = run_python(native_implementation, tmp_path, ROOT / "examples" / "train_moe_lm.py", *sizes)
    assert f"implementation {native_implementation}" in output
    assert "One step is the reference implementation's" in output
    assert "unigram entropy" in output
    assert (tmp_path / "out" / "train_moe_lm.png").stat().st_size > 0


@pytest.mark.parametrize("options", ["", "--fp8"])
def test_decode(native_implementation, tmp_path, options):
    sizes = "--train-steps 0 --steps 12".split()
    output = run_python(native_implementation, tmp_path, ROOT / "examples" / "decode.py", *sizes, *options.split())
    assert f"implementation {native_implementation}" in output and "tokens/s" in output
    assert "The expression |" in output
    assert "The text is the reference implementation's" in output


def test_readme(native_implementation, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    blocks.append(f"assert comm.config.implementation == {native_implementation!r}; assert jnp.isfinite(value)")
    run_python(native_implementation, tmp_path, "-c", "\n".join(blocks))

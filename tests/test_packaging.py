"""What is shipped: the source distribution, the version, extensions that load together and are as their stubs say.

`make wheel` tries a built wheel, see smoke.py.
"""

import ast
import importlib.machinery
import importlib.metadata
import importlib.util
import pathlib
import sys
import tarfile

import pytest
from commands import ROOT, run

import jax_ep

MAX_SDIST_BYTES = 2 << 20
SHIPPED = {"cmake", "docs", "examples", "ffi", "jax_ep", "tests"} | {
    *("CHANGELOG.md", "CMakeLists.txt", "CONTRIBUTING.md", "LICENSE", "Makefile", "PKG-INFO", "README.md"),
    *("mkdocs.yml", "pyproject.toml"),
}


def built(name: str) -> pathlib.Path:
    """The file of an extension: the installed one, or where there is none that of `make cuda`."""
    spec = importlib.util.find_spec(f"jax_ep.{name}")
    if spec is not None:
        return pathlib.Path(spec.origin)
    candidates = [ROOT / "build" / "cuda" / f"{name}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    file = next(filter(pathlib.Path.exists, candidates), None)
    if file is None:
        pytest.skip(f"{name} is not built; `make cuda` does it")
    sources = [*ROOT.glob("ffi/**/*.*"), *ROOT.glob("cmake/*")]
    if file.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        pytest.skip(f"{file} is older than its sources; `make cuda` builds it again")
    return file


def test_version():
    assert importlib.metadata.version("jax_ep") == jax_ep.__version__


def test_source_distribution(tmp_path):
    pytest.importorskip("scikit_build_core")
    run(sys.executable, "-c", f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})")
    name = f"jax_ep-{jax_ep.__version__}"
    sdist = tmp_path / f"{name}.tar.gz"
    assert sdist.stat().st_size < MAX_SDIST_BYTES
    with tarfile.open(sdist) as archive:
        files = {pathlib.PurePath(file).relative_to(name) for file in archive.getnames()}
        metadata = archive.extractfile(f"{name}/PKG-INFO").read().decode()
    assert f"\nVersion: {jax_ep.__version__}\n" in metadata
    assert {file.parts[0] for file in files} <= SHIPPED
    strange = [str(file) for file in files if file.suffix in (".so", ".pyc") or "/." in f"/{file}"]
    assert not strange
    # All that a build reads.
    needed = {
        file.relative_to(ROOT)
        for folder, pattern in (("jax_ep", "**/*.py*"), ("ffi", "**/*.*"), ("cmake", "*.cmake"), ("tests", "**/*.py"))
        for file in (ROOT / folder).glob(pattern)
        if "__pycache__" not in file.parts
    }
    assert not (needed | {pathlib.PurePath("jax_ep/py.typed")}) - files


def meaning(stub: pathlib.Path) -> str:
    """However it is laid out."""
    return ast.dump(ast.parse(stub.read_text()))


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_stub(name, tmp_path):
    pytest.importorskip("nanobind.stubgen")
    file = built(name)
    stub = tmp_path / f"{name}.pyi"
    # Beside its file, without the package, which would bring jax.
    run(sys.executable, "-m", "nanobind.stubgen", "-q", "-m", name, "-i", file.parent, "-o", stub)
    shipped = ROOT / "jax_ep" / stub.name
    assert meaning(stub) == meaning(shipped), f"`make stubs` writes jax_ep/{stub.name}"


def test_extensions_load_side_by_side():
    """Both bind the same C++ types, of which one registry would keep the first module's alone."""
    load = """
import importlib.util, sys
for path in sys.argv[1:]:
    name = path.rpartition("/")[2].partition(".")[0]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    types = [getattr(module, kind) for kind in ("MoEShape", "CommunicatorSpec", "Communicator")]
    assert all(kind.__module__ == name for kind in types), types
"""
    run(sys.executable, "-W", "error", "-c", load, built("_cpu"), built("_cuda"))

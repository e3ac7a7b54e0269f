"""The code of the documentation runs as it is printed, its links lead somewhere, and the site builds."""

import functools
import importlib
import importlib.util
import pathlib
import pkgutil
import re
import sys
import textwrap
import types

import jax
import pytest
from commands import ROOT, run
from test_examples import run_python

import jax_ep
from jax_ep.bench.peers import PEERS, SIZES, Peer

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
LINKING = [*PAGES, *ROOT.glob("*.md"), *ROOT.glob("examples/*.md")]
SITE_PACKAGES = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers.python")
MOST_RANKS = 4  # that a page asks for
MOST_BLOCKS_NOT_RUN = 8

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=indent)``` *$", re.DOTALL | re.MULTILINE
)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^\n]+?) -->\s*\Z")
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)(?:\s+\"[^\"]*\")?\)")
HTML_LINK = re.compile(r"<(?:a|img)\b[^>]*?(?:href|src)=\"(?P<target>[^\"]+)\"")


def page_id(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: pathlib.Path):
    """Each block of code: where it begins, its language, its lines, and why it is not run."""
    text = page.read_text()
    for match in FENCE.finditer(text):
        marker = NOT_RUN.search(text[: match.start()])
        yield match, match["language"].strip(), textwrap.dedent(match["code"]), marker and marker["reason"]


def program(page: pathlib.Path) -> str:
    """The page's Python, each line where it stands in the page, so that a traceback names the page's line."""
    text, lines = page.read_text(), []
    for match, language, code, reason in blocks(page):
        if language == "python" and not reason:
            first_line = text.count("\n", 0, match.start("code"))
            lines += [""] * (first_line - len(lines)) + code.splitlines()
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("page", [page for page in PAGES if program(page).strip()], ids=page_id)
def test_code_runs(native_implementation, tmp_path, page):
    if native_implementation == "cuda" and len(jax.devices("gpu")) < MOST_RANKS:
        pytest.skip(f"pages are written for {MOST_RANKS} devices and more")
    path = tmp_path / f"{page.stem}.py"
    path.write_text(program(page))
    run_python(native_implementation, tmp_path, path)


def test_most_code_is_run():
    languages = {language for page in PAGES for _, language, _, _ in blocks(page)}
    assert not languages & {"py", "python3", "Python", "ipython", "pycon"}, "only ```python is run"
    not_run = [(page_id(page), reason) for page in PAGES for *_, reason in blocks(page) if reason]
    assert len(not_run) <= MOST_BLOCKS_NOT_RUN, not_run
    markers = sum(page.read_text().count("<!-- not run") for page in PAGES)
    assert markers == len(not_run), "a marker stands directly before its block, and gives a reason"


def anchors(page: pathlib.Path) -> set[str]:
    """What a link to the page may name: headings as MkDocs and forges spell them, and names of the API."""
    text = FENCE.sub("", page.read_text())
    headings = [
        re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    ]
    api = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", heading) for heading in headings} | set(api)


def is_public(name: str) -> bool:
    """Whether a documented object has a member of that name, as in jax_ep.MoECommunicator.check."""
    owner, _, member = name.rpartition(".")
    module, _, object_name = owner.rpartition(".")
    return owner in public_names() and hasattr(getattr(sys.modules[module], object_name), member)


@pytest.mark.parametrize("page", LINKING, ids=page_id)
def test_links_resolve(page):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
    for target in [match["target"] for pattern in (LINK, HTML_LINK) for match in pattern.finditer(text)]:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target}: no such file"
        assert linked.is_relative_to(ROOT), f"{target}: outside the repository"
        if anchor:
            assert anchor in anchors(linked) or is_public(anchor), f"{target}: no such heading"


def public_modules() -> list[types.ModuleType]:
    """jax_ep, the packages in it that say what is public, and modules of those that do."""
    packages = [name for _, name, is_package in pkgutil.iter_modules(jax_ep.__path__) if is_package]
    found = [jax_ep]
    for package in [importlib.import_module(f"jax_ep.{name}") for name in packages]:
        if hasattr(package, "__all__"):
            names = [name for _, name, _ in pkgutil.iter_modules(package.__path__) if not name.startswith("_")]
            modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
            found += [package, *(module for module in modules if hasattr(module, "__all__"))]
    return found


def public_names() -> list[str]:
    return [f"{module.__name__}.{name}" for module in public_modules() for name in module.__all__]


def test_api_reference_is_complete():
    documented = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(public_names())


@functools.cache
def missing_packages() -> list[str]:
    def is_missing(name):
        try:
            return importlib.util.find_spec(name) is None
        except ModuleNotFoundError:
            return True

    return [name for name in SITE_PACKAGES if is_missing(name)]


@pytest.mark.skipif(bool(missing_packages()), reason="needs the extra docs: pip install 'jax_ep[docs]'")
def test_site_builds(tmp_path):
    build = sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"
    run(*build, PYTHONDONTWRITEBYTECODE="1")
    pages = {path.name: path.read_text() for path in (tmp_path / "site").glob("**/*.html")}
    for name in public_names():
        assert f'id="{name}"' in pages["api.html"], name
    fetched = re.compile(r"<(?:script|img|iframe)[^>]+src=\"?https?:|<link[^>]+stylesheet[^>]+https?:|url\(https?:")
    for name, html in pages.items():
        assert not fetched.search(html), f"{name} would fetch something from the network"


def test_picture_of_the_speedup_is_up_to_date():
    spec = importlib.util.spec_from_file_location("speedup", DOCS / "_speedup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PICTURE.read_text() == module.draw(), "run: python docs/_speedup.py"


def test_other_libraries_of_the_performance_page_are_those_of_the_bench():
    """A row for each, with its figures and what the bench says of it, and no other row."""
    text = (DOCS / "performance.md").read_text()
    (section,) = re.findall(r"^## Other libraries\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    tables = re.findall(r"^\|.*\n\|[-|]+\|\n((?:\|.*\n)+)", section, re.MULTILINE)
    for table, (workload, peers) in zip(tables, PEERS.items(), strict=True):
        assert f"{SIZES[workload]}, microseconds:" in section
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        assert [row[:3] for row in rows] == [[peer.name, peer.dispatch, peer.combine] for peer in peers]
        for (*_, note), peer in zip(rows, peers, strict=True):
            is_own = (peer.hardware, peer.source) == (Peer.hardware, Peer.source)
            assert note == (peer.note if is_own else f"{peer.note}; {peer.hardware}, {peer.source}")
    assert Peer.hardware in " ".join(section.split())


def test_tests_that_the_readme_names_exist():
    shown = re.findall(r"\[`(test_\w+)`\]\((tests/\w+\.py)\)", (ROOT / "README.md").read_text())
    assert len(shown) > 20
    assert not [name for name, file in shown if f"def {name}(" not in (ROOT / file).read_text()]

"""Every error text that a user can see is on docs/troubleshooting.md with all of its fixed words, and no other is.

The texts come from the sources: by `ast` from Python, by regular expressions from C++. An entry of the page is a list
item that begins with texts, in which `...` stands for what varies. Not looked for:

- what argparse prints, and what `python -m jax_ep.doctor` finds: both say by themselves what to do;
- texts without a fixed word, which pass on what another one says.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"

# Strings, and None for what varies.
Parts = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Text:
    """An error's text. One that a helper words alike for many arguments has its argument's name beside it."""

    parts: Parts
    name: str | None = None


# ---- Python ----

HELPERS: dict[str, list[Parts]] = {
    "expect_int": [(None, ": expected an int, got ", None), (None, ": expected at least ", None, ", got ", None)],
    "expect_array": [
        (None, ": expected an array, got ", None),
        (None, ": expected shape [", None, "], got shape ", None),
        (None, ": expected dtype ", None, ", got ", None),
    ],
    "expect_dtype": [
        (None, ": expected a dtype, one of ", None, ", got ", None),
        (None, ": expected one of ", None, ", got ", None),
    ],
}


class Scope:
    """What the names at some place of the sources may stand for."""

    def __init__(self, values: dict[str, list[ast.expr]]):
        self._values = values

    def inside(self, node: ast.AST) -> Scope:
        """In a function, or a loop over constants."""
        values = dict(self._values)
        if isinstance(node, ast.FunctionDef):
            for inner in ast.walk(node):
                for name, value in assignments(inner):
                    values[name] = [*values.get(name, []), value]
        elif isinstance(node, ast.For):
            for target in ast.walk(node.target):
                if isinstance(target, ast.Name):
                    is_known = target is node.target and isinstance(node.iter, ast.Tuple)
                    values[target.id] = node.iter.elts if is_known else []
        return Scope(values)

    def texts(self, node: ast.expr) -> list[Parts]:
        """What an expression may say."""
        match node:
            case ast.Constant(value=str(value)):
                return [(value,)]
            case ast.JoinedStr(values=values):
                return [tuple(self._part(value) for value in values)]
            case ast.IfExp(body=body, orelse=orelse):
                return self.texts(body) + self.texts(orelse)
            case ast.BoolOp(values=values):
                return [parts for value in values for parts in self.texts(value)]
            case ast.Call(func=ast.Attribute(value=ast.JoinedStr() as value)):
                return self.texts(value)
            case ast.Name(id=name) if self._values.get(name):
                return [parts for value in self._values[name] for parts in self.texts(value)]
        return [(None,)]

    def _part(self, value: ast.expr) -> str | None:
        """Of an f-string; what is put in may be a constant too."""
        if isinstance(value, ast.FormattedValue) and isinstance(value.value, ast.Name):
            match self.texts(value.value):
                case [(str(text),)]:
                    return text
        return value.value if isinstance(value, ast.Constant) else None


def assignments(node: ast.AST) -> list[tuple[str, ast.expr]]:
    match node:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            return [(name, value)]
        case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
            pairs = zip(targets, values, strict=True)
            return [(target.id, value) for target, value in pairs if isinstance(target, ast.Name)]
    return []


def texts_of(node: ast.AST, scope: Scope) -> list[Text]:
    match node:
        case ast.Raise(exc=ast.Call(args=[message, *_])):
            return [Text(parts) for parts in scope.texts(message)]
        case ast.Call(func=ast.Name(id="expect"), args=[_, argument, expected, _]):
            names, wanted = scope.texts(argument), scope.texts(expected)
            return [Text((*name, ": expected ", *parts, ", got ", None)) for name in names for parts in wanted]
        case ast.Call(func=ast.Name(id=helper), args=[argument, *_]) if helper in HELPERS:
            names = [parts[0] for parts in scope.texts(argument)]
            return [Text(parts, name) for parts in HELPERS[helper] for name in names]
    return []


def python_texts(source: str) -> list[Text]:
    def walk(node: ast.AST, scope: Scope) -> Iterator[Text]:
        for child in ast.iter_child_nodes(node):
            inside = scope.inside(child)
            yield from texts_of(child, inside)
            yield from walk(child, inside)

    return list(walk(ast.parse(source), Scope({})))


# ---- C++ ----

STRING = r'"(?:[^"\\]|\\.)*"'
STATEMENT = re.compile(rf'(?:{STRING}|[^";])+')
# What makes an error of the strings in its statement.
ERROR = re.compile(r'Failed\(|Error::\w+\(|ffi::Error\(|runtime_error\(|snprintf\(|return "|const char k\w+\[\] =')
CHECK = re.compile(r"hecks(?:\.|->)(Elements|Type|True)\((.*)", re.DOTALL)
CHECKS: dict[str, Parts] = {
    "Elements": ("jax_ep: ", None, ": expected ", None, " elements, got ", None),
    "Type": ("jax_ep: ", None, ": expected XLA type ", None, ", got ", None),
}
# What `Failed` puts behind the text it is given.
FAILED: dict[str, Parts] = {"cpu": (" failed: ", None), "cuda": (": ", None)}
# Of texts that pass on another.
PREFIXES = ("", "jax_ep")
CONVERSION = re.compile(r"%[-.\d]*l*[dgs]")  # of printf


def literals(code: str) -> Parts:
    """The strings in it, and None between them; what printf converts varies too."""
    code = re.sub(rf"({STRING})(?:\s+(?={STRING}))", lambda match: match[1] + "\0", code).replace('"\0"', "")
    parts: list[str | None] = []
    for literal in re.findall(STRING, code):
        for piece in CONVERSION.split(literal[1:-1].replace('\\"', '"')):
            parts += [None, piece]
    return tuple(parts[1:])


def cpp_texts(source: str, folder: str) -> list[Text]:
    texts = []
    for statement in STATEMENT.findall(re.sub(r"//[^\n]*", "", source)):
        if check := CHECK.search(statement):
            method, (text, *_) = check[1], literals(check[2])
            texts.append(Text(CHECKS[method], text) if method in CHECKS else Text(("jax_ep: ", text)))
        elif "std::string Failed(" not in statement and ERROR.search(statement) and any(literals(statement)):
            failed = FAILED.get(folder, ()) if "Failed(" in statement else ()
            texts.append(Text((*literals(statement), None, *failed)))
    return texts


@functools.cache
def all_texts() -> dict[Text, str]:
    """Where each comes from."""
    found: dict[Text, str] = {}
    for path in sorted(ROOT.glob("jax_ep/**/*.py")):
        found |= {text: str(path.relative_to(ROOT)) for text in python_texts(path.read_text())}
    for path in sorted(path for path in ROOT.glob("ffi/*/*") if path.suffix in {".cc", ".h", ".cu", ".cuh"}):
        found |= {text: str(path.relative_to(ROOT)) for text in cpp_texts(path.read_text(), path.parent.name)}
    return {text: path for text, path in found.items() if "".join(filter(None, text.parts)).strip(": ") not in PREFIXES}


# ---- The page ----

SPAN = r"`[^`]+`"
ENTRY = re.compile(rf"^- ({SPAN}(?:,\s+{SPAN})*)", re.MULTILINE)


def one_line(text: str) -> str:
    return " ".join(text.split())


def entries(page: str) -> list[str]:
    return [one_line(span[1:-1]) for entry in ENTRY.findall(page) for span in re.findall(SPAN, entry)]


def names(page: str) -> set[str]:
    without_blocks = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    return {span[1:-1] for span in re.findall(SPAN, without_blocks)}


def says(entry: str, text: Text) -> bool:
    """Whether an entry has all of a text's fixed words in their order."""
    words = "".join(".*" if part is None else re.escape(re.sub(r"\s+", " ", part)) for part in text.parts)
    return re.fullmatch(rf"(?:jax_ep: )?{words}", entry) is not None


def as_written(text: Text) -> str:
    return "".join("..." if part is None else part for part in text.parts)


# ---- Tests ----


def test_every_text_has_an_entry():
    page = PAGE.read_text()
    missing = {
        f"{path}: {as_written(text)}"
        for text, path in all_texts().items()
        if not any(says(entry, text) for entry in entries(page))
    }
    unnamed = {
        f"{path}: {text.name}" for text, path in all_texts().items() if text.name and text.name not in names(page)
    }
    assert not missing | unnamed, "\n".join(sorted(missing | unnamed))


def test_every_entry_is_of_a_text():
    # Those of the helpers themselves would fit nearly everything.
    texts = [text for text, path in all_texts().items() if path != "jax_ep/_checks.py"]
    texts += [text for text in python_texts((ROOT / "jax_ep" / "_checks.py").read_text()) if "shard_map" in str(text)]
    stale = [entry for entry in entries(PAGE.read_text()) if not any(says(entry, text) for text in texts)]
    assert not stale, "\n".join(stale)


def test_texts_of_python():
    source = """
def f(x, name):
    blocks, n = f"a divisor of {x}", 3
    expect(x, "size", blocks, x)
    for name in ("a", "b"):
        expect_int(name, x)
    expect(x, name, "1" if x else "2", x)
    raise ValueError(f"{x}: too {n} " "large")
"""
    got = python_texts(source)
    assert Text(("size", ": expected ", "a divisor of ", None, ", got ", None)) in got
    assert {text.name for text in got if text.name} == {"a", "b"}
    assert {text.parts[2] for text in got if text.parts[-2] == ", got "} >= {"1", "2"}
    assert Text((None, ": too ", None, " large")) in got


def test_texts_of_cpp():
    source = r"""
  if (a) return "no " + b + ": \"c\"; d";  // "e"
  return Failed("allocating", error);
  checks->Elements("x", 1, 2);
  checks.True(f(x, 1),
              "y: not "
              "here");
  std::snprintf(text, sizeof text, "rank %d waited %.3g s", 1, 2.0);
  const int n = Count("of no error");
"""
    got = [text.parts for text in cpp_texts(source, "cuda")]
    assert got == [
        ("no ", None, ': "c"; d', None),
        ("allocating", None, ": ", None),
        CHECKS["Elements"],
        ("jax_ep: ", "y: not here"),
        ("rank ", None, " waited ", None, " s", None),
    ]


def test_what_says_is():
    assert says("jax_ep: dispatch: ...", Text(("dispatch", ": ", None)))
    assert not says("at most ... rows", Text(("at least ", None)))
    assert entries("- `a ...`,\n  `b`: c `d`\n- e `f`\n") == ["a ...", "b"]

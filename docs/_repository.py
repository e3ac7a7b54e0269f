"""A hook of MkDocs: files of the repository outside docs/ that pages link to become part of the site.

So links such as ../CONTRIBUTING.md lead somewhere both on the site and where the Markdown is read as it lies.
"""

import os
import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
PREFIX = "repository/"
ALWAYS = ("CHANGELOG.md", "CONTRIBUTING.md")  # in the nav
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
CODE = re.compile(r"(^ *(?:```|~~~).*?^ *(?:```|~~~)|`[^`\n]+`)", re.DOTALL | re.MULTILINE)


def _target(page: str, link: str) -> str | None:
    """The file in the repository, by its path there, that a page of this path links to; None if there is none."""
    if "://" in link or link.startswith(("/", "mailto:")):
        return None
    path = os.path.normpath(os.path.join(os.path.dirname(page), link))
    return path if (ROOT / path).is_file() else None


def _in_repository(src_uri: str) -> str:
    return src_uri.removeprefix(PREFIX) if src_uri.startswith(PREFIX) else f"docs/{src_uri}"


def _on_site(path: str) -> str:
    return path.removeprefix("docs/") if path.startswith("docs/") else PREFIX + path


def _links(path: str):
    text = CODE.sub("", (ROOT / path).read_text())
    targets = (_target(path, match[2]) for match in LINK.finditer(text))
    return [target for target in targets if target is not None]


def on_files(files, config):
    """Adds what pages link to, and what that links to."""
    pages = [_in_repository(file.src_uri) for file in files.documentation_pages()]
    added = set(ALWAYS)
    todo = [*pages, *ALWAYS]
    while todo:
        new = {target for target in _links(todo.pop()) if not target.startswith("docs/")} - added
        added |= new
        todo += sorted(path for path in new if path.endswith(".md"))
    for path in sorted(added):
        files.append(File.generated(config, PREFIX + path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Points links to where their files are on the site."""
    here = page.file.src_uri

    def rewrite(match):
        target = _target(_in_repository(here), match[2])
        if target is None:
            return match[0]
        link = os.path.relpath(_on_site(target), os.path.dirname(here) or ".")
        return f"{match[1]}{link}{match[3] or ''}{match[4]}"

    # Split by code, which stands in the odd places.
    parts = CODE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(rewrite, part) for i, part in enumerate(parts))

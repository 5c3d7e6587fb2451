"""Hooks of the site: they add pages from outside of docs/, and remove Sphinx's roles from docstrings."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

HOME = "README.md"
PAGES = (HOME, "CONTRIBUTING.md", "CHANGELOG.md")
FILES = ("CITATION.cff",)
FOLDERS = ("benchmarks/results", "notebooks")
SHOWN = (".md", ".png", ".json", ".svg", ".ipynb")
LINK = re.compile(r"(\]\()([^)#\s:]+)([)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as the home page, other files of the root, the results of the benchmarks and the notebooks."""
    root = Path(config.config_file_path).parent
    inside = (path for folder in FOLDERS for path in (root / folder).rglob("*") if path.suffix in SHOWN)
    for path in [*(root / name for name in PAGES + FILES), *sorted(inside)]:
        name = path.relative_to(root).as_posix()
        files.append(File.generated(config, site_path(name), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links between files of the repository to the pages of the site. Links to other files stay as they are."""
    source = page.file.src_uri
    folder = posixpath.dirname(repository_path(source))

    def lead(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        if match[2].startswith("/") or files.get_file_from_path(site_path(target)) is None:
            return match[0]
        return match[1] + posixpath.relpath(site_path(target), posixpath.dirname(source) or ".") + match[3]

    return LINK.sub(lead, markdown)


def site_path(name: str) -> str:
    """The path on the site of a file of the repository."""
    return "index.md" if name == HOME else name.removeprefix("docs/")


def repository_path(page: str) -> str:
    """The inverse of `site_path`."""
    if page == "index.md":
        return HOME
    return page if page in PAGES or page.startswith(FOLDERS) else f"docs/{page}"


class PlainNames(griffe.Extension):
    """Docstrings name other objects as :class:`Name`; a page shows `Name`."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", obj.docstring.value)

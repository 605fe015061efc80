"""Links that leave docs/: images are copied into the site, all else leads to the repository.

The same Markdown is read in the repository, where such links are relative paths.
"""

import os
import posixpath
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

_LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
_OTHER_FILE = re.compile(r'--8<-- "(\S+)"')  # as of pymdownx.snippets, which would leave the links as they are
_IMAGES = (".png", ".svg")
_FORMULA = re.compile(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links that leave docs/; a page may be a file of the repository, links included."""
    docs, folder = Path(config.docs_dir), Path(page.file.abs_src_path).parent
    if shown := _OTHER_FILE.fullmatch(markdown.strip()):
        source = folder / shown[1]
        markdown, folder = source.read_text(encoding="utf-8"), source.parent

    def rewritten(link: re.Match[str]) -> str:
        path = Path(os.path.normpath(folder / link[1]))
        if docs in path.parents:
            return link[0]
        if not path.exists():
            raise PluginError(f"{page.file.src_uri}: the link {link[1]} leads nowhere")
        inside = path.relative_to(docs.parent).as_posix()
        if path.suffix not in _IMAGES:
            kind = "tree" if path.is_dir() else "blob"
            return f"]({config.repo_url}/{kind}/main/{inside}{link[2] or ''})"
        if files.get_file_from_path(inside) is None:
            files.append(File.generated(config, inside, abs_src_path=str(path)))
        return f"]({posixpath.relpath(inside, posixpath.dirname(page.file.src_uri) or '.')})"

    return _LINK.sub(rewritten, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Turn formulas into MathML, which browsers show without a script."""

    def shown(formula: re.Match[str]) -> str:
        return convert(unescape(formula[2]), display="block" if formula[1] == "div" else "inline")

    return _FORMULA.sub(shown, html)

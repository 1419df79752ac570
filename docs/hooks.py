"""MkDocs hook: adds pages from outside of `docs/` to the site, and adapts links.

Links to source files, which are not part of the site, become plain text.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "MODEL_CARD.md": "model-card.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks-all.md",
}
"""Names in the site, by path relative to the root of the repository."""


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages and the plots of the benchmarks to the site."""
    for path, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    for plot in sorted((ROOT / "benchmarks" / "results").glob("*.svg")):
        files.append(File.generated(config, f"results/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Returns the text of a page with links adapted to the site."""
    homes = {name: path for path, name in PAGES.items()}
    home = posixpath.dirname(homes.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def linked(link: re.Match[str]) -> str:
        text, target = link[1], link[2]
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(home, path))
        name = PAGES.get(path, path.removeprefix("docs/"))
        if path not in PAGES and path == name:
            return text
        return f"[{text}]({name}{'#' if anchor else ''}{anchor})"

    # All links but images, links to other hosts and anchors on the same page.
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?![a-z]+:|#)([^)\s]+)\)", linked, markdown)

"""What makes a site of the documentation: README.md is its first page, and links to files of the repository that are
no pages lead to where the repository is published (`extra.repository` in mkdocs.yml), or are plain text.

mkdocs calls these functions, by their names.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """README.md stands beside docs/; its links begin there."""
    text = (ROOT / "README.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page with links to the repository's other files mended."""
    folder = "" if page.file.src_path == "index.md" else "docs"

    def mended(found: re.Match[str]) -> str:
        text, target = found.groups()
        path, _, anchor = target.partition("#")
        if "://" in target or not path or files.get_file_from_path(posixpath.normpath(path)):
            return found[0]
        outside = posixpath.normpath(posixpath.join(folder, path))
        if not (ROOT / outside).exists():
            return found[0]  # mkdocs says that it leads nowhere
        if repository := config["extra"]["repository"]:
            return f"[{text}]({repository.rstrip('/')}/{outside}{'#' if anchor else ''}{anchor})"
        return f"{text} (`{outside}`)"

    return _LINK.sub(mended, markdown)

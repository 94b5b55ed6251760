"""Hooks of ProperDocs: pages from files outside docs/, and links to source files.

The pages are written for a reader of the repository, so they link to README.md and to source files.
The site has neither.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from properdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
"""Pages of the site by the files of the repository that hold them."""
SITE_NAMES = {source: f"docs/{page}" for page, source in PAGES.items()}
FENCED = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> None:
    """Adds the pages from files outside docs/."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Makes links lead to pages of the site; a source file has a link only with a repo_url."""
    uri = page.file.src_uri
    repository = (config.repo_url or "").rstrip("/")
    parts = FENCED.split(markdown)  # code stands at the odd places
    parts[::2] = [
        LINK.sub(lambda match: _link(match, uri, repository), text) for text in parts[::2]
    ]
    return "".join(parts)


def _link(match: re.Match[str], uri: str, repository: str) -> str:
    image, text, target = match.groups()
    if re.match(r"[a-z]+:|#", target):
        return match[0]
    path, hash_sign, anchor = target.partition("#")
    written_in = PAGES.get(uri, f"docs/{uri}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(written_in), path))
    path = SITE_NAMES.get(path, path)
    if path.startswith("docs/"):
        relative = posixpath.relpath(path, posixpath.dirname(f"docs/{uri}"))
        return f"{image}[{text}]({relative}{hash_sign}{anchor})"
    if repository:
        return f"[{text}]({repository}/blob/main/{path}{hash_sign}{anchor})"
    return text

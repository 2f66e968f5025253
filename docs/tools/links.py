"""A hook of MkDocs: links that leave ``docs/`` work on the site as they do in the repository.

Some files outside ``docs/`` become pages of the site (:data:`PAGES`). Links to other files lead to the repository if ``repo_url`` is set, and become
plain text otherwise. A link to a file that does not exist is a warning, which ``mkdocs build --strict`` turns into an error.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]

PAGES = {
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "examples/paper/README.md": "project/paper-experiment.md",
    "meteora_core/starter/checkpoint/README.md": "project/starter-checkpoint.md",
    **{f"notes/lab/{file.name}": f"lab/{'index.md' if file.name == 'README.md' else file.name}" for file in sorted((ROOT / "notes" / "lab").glob("*.md"))},
}
"""Files of the repository outside ``docs/`` -> their place on the site."""

SOURCES = {place: file for file, place in PAGES.items()}

LINK = re.compile(r"(?P<ticks>`+)(?!`).*?(?<!`)(?P=ticks)(?!`)|(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^()\s]+)\)", re.DOTALL)
"""A code span, in which nothing is a link, or a link, whose text may contain code spans."""

_log = logging.getLogger("mkdocs.plugins.links")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in ``docs/``."""
    for file, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / file).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite the links of a page, except within code."""
    place = page.file.src_uri
    source = SOURCES.get(place, f"docs/{place}")
    parts = re.split(r"(?ms)(^ *```.*?^ *```[^\n]*$)", markdown)
    return "".join(part if index % 2 else LINK.sub(lambda match: rewrite(match, source, place, config.repo_url), part) for index, part in enumerate(parts))


def rewrite(match: re.Match[str], source: str, place: str, repository: str | None) -> str:
    """One link of the page at ``place`` on the site, whose file in the repository is ``source``; code spans stay as they are."""
    if match["ticks"]:
        return match[0]
    image, text, target = match["image"], match["text"], match["target"]
    path, hash_sign, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", target):
        return match[0]
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if not (ROOT / file).exists():
        _log.warning("%s links to %s, which does not exist", source, file)
        return match[0]
    inside = file.removeprefix("docs/") if file.startswith("docs/") else PAGES.get(file)
    if inside is not None:
        return f"{image}[{text}]({posixpath.relpath(inside, posixpath.dirname(place) or '.')}{hash_sign}{anchor})"
    return f"{image}[{text}]({repository.rstrip('/')}/blob/main/{file}{hash_sign}{anchor})" if repository else text

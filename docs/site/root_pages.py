"""A hook of mkdocs: CONTRIBUTING.md and CHANGELOG.md as pages, and links that leave the site.

Files outside docs/ are not on the site, and the project has no address to link to. Their links
become plain names.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?![a-z]+:|#)([^)#]+)(#[^)]*)?\)")


def without_outer_links(text: str, is_page: set[str], folder: str) -> str:
    """The text with links to pages made relative to docs/, and the others made plain."""

    def replace(match: re.Match) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        if target in PAGES:
            return f"[{words}]({PAGES[target]}{anchor})"
        path = PurePosixPath(target)
        if folder == ".":  # a file of the root
            if path.parts[0] != "docs":
                return words
            path = path.relative_to("docs")
        elif target.startswith("../"):
            return words
        return f"[{words}]({path}{anchor})" if str(path) in is_page else match[0]

    return LINK.sub(replace, text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    known = {file.src_uri for file in files}
    for source, name in PAGES.items():
        text = without_outer_links((ROOT / source).read_text(), known, ".")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri in PAGES.values():
        return markdown  # done above
    return without_outer_links(markdown, {file.src_uri for file in files}, "docs")

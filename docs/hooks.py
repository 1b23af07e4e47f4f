"""What the pages need beside Markdown, for MkDocs."""

import re
from pathlib import Path

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(r'\[([^]]*)\]\(\.\./([^)]+)\)')
"""A link to a file of the repository that is no page."""
ROLE = re.compile(r':(?:attr|class|data|exc|func|meth|mod):(?=<code>)')
"""What the docstrings put before a name."""


def on_page_markdown(markdown, page, **kwargs):
    """Names the files of the repository that a page links to, since the site does not hold them."""

    def name(link):
        text, path = link.groups()
        if not (ROOT / path).exists():
            raise PluginError(f'{page.file.src_uri} links to {path}, which does not exist')
        return f'`{path}`' if text.strip('`') == path else f'{text} (`{path}`)'

    return OUTSIDE.sub(name, markdown)


def on_page_content(html, **kwargs):
    """Drops the roles of the docstrings' references, which only Sphinx knows."""
    return ROLE.sub('', html)

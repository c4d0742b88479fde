"""A hook of mkdocs: docstrings refer to code with roles such as ``:func:`~package.name```; the site shows ``name``."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):<code>(~?)([\w.]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Show the name of a role alone, without its module where it begins with a tilde."""
    return _ROLE.sub(lambda m: f"<code>{m[2].rpartition('.')[2] if m[1] else m[2]}</code>", html)

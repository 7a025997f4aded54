"""What MkDocs does besides: see `hooks` in mkdocs.yml."""

import re


def on_page_content(html: str, **kwargs) -> str:
    """Docstrings are written as transformers' are: "[`Session`]" and "(`int`)", of which code is left here."""
    html = re.sub(r"\[(<code>[^<]*</code>)\]", r"\1", html)
    return re.sub(r"<code>(`[^<]*`[^<]*)</code>", lambda found: f"<code>{re.sub('[`*]', '', found[1])}</code>", html)

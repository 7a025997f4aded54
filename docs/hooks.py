"""What MkDocs does besides: see `hooks` in mkdocs.yml."""

import re


def on_page_content(html: str, **kwargs) -> str:
    """Docstrings refer to names as transformers' do, "[`Session`]": the brackets are for another program."""
    return re.sub(r"\[(<code>[^<]*</code>)\]", r"\1", html)

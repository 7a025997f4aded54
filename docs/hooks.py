"""What MkDocs does besides: see `hooks` in mkdocs.yml."""

import re
from pathlib import PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> None:
    """A notebook, as it was executed, is a page too: `notebooks/NAME.md` in the navigation."""
    from nbconvert import MarkdownExporter

    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        path = PurePosixPath(notebook.src_uri)
        names = {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
        text, resources = MarkdownExporter().from_filename(notebook.abs_src_path, resources=names)
        files.append(File.generated(config, str(path.with_suffix(".md")), content=text))
        for name, content in resources["outputs"].items():
            files.append(File.generated(config, str(path.parent / name), content=content))


def on_page_markdown(markdown: str, **kwargs) -> str:
    """Links to notebooks, which lead to the files where the text is read as it is, lead to their pages."""
    return markdown.replace(".ipynb)", ".md)")


def on_page_content(html: str, **kwargs) -> str:
    """Docstrings are written as transformers' are: "[`Session`]" and "(`int`)", of which code is left here."""
    html = re.sub(r"\[(<code>[^<]*</code>)\]", r"\1", html)
    return re.sub(r"<code>(`[^<]*`[^<]*)</code>", lambda found: f"<code>{re.sub('[`*]', '', found[1])}</code>", html)

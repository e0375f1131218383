"""What the site takes from elsewhere in the repository: the README as its first page, result tables, notebooks."""

from __future__ import annotations

import re
from importlib import import_module
from inspect import unwrap
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
# Links are written as they work in the repository; the site has these folders elsewhere.
_README = (
    (r"\]\(docs/", "]("),
    (r"\]\(benchmarks/results/", "](results/"),
    (r"\]\(notebooks/(\w+)\.ipynb", r"](notebooks/\1.md"),
)
_CARD = ((r"\]\(\.\./benchmarks/results/", "](results/"), (r"\]\(\.\./notebooks/(\w+)\.ipynb", r"](notebooks/\1.md"))
_NOTEBOOK = ((r"\]\(\.\./benchmarks/results/", "](../results/"), (r"\]\(\.\./docs/", "](../"))
# Files that the site does not hold: a link to them becomes their name.
_OUTSIDE = re.compile(r"\[([^]]*)\]\((?:\.\./)?(?:[A-Z]+\.md|LICENSE|benchmarks/[^)]*\.py|tests/[^)]*)\)")


def on_config(config: MkDocsConfig) -> None:
    """Put them into the navigation, under their own titles."""
    for title, folder, suffix in (
        ("Notebooks", "notebooks", "*.ipynb"),
        ("Measurements", "benchmarks/results", "*.md"),
    ):
        if pages := [f"{Path(folder).name}/{path.stem}.md" for path in sorted((ROOT / folder).glob(suffix))]:
            config.nav.append({title: pages})


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them to the files of the docs folder."""
    files.append(
        File.generated(config, "index.md", content=_relinked((ROOT / "README.md").read_text("utf-8"), _README))
    )
    for path in sorted((ROOT / "benchmarks" / "results").iterdir()):
        if path.suffix in (".md", ".png"):
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, resources = MarkdownExporter().from_filename(str(path))
        files.append(
            File.generated(
                config, f"notebooks/{path.stem}.md", content=text.replace("](output_", f"]({path.stem}_output_")
            )
        )
        for name, content in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{path.stem}_{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Point the links of cards and notebooks at where the site has their targets; write a module's public names out."""
    markdown = re.sub(r"^::: (\S+)\.\*$", _public_names, markdown, flags=re.MULTILINE)
    rules = _NOTEBOOK if page.file.src_uri.startswith("notebooks/") else _CARD
    return _OUTSIDE.sub(r"\1", _relinked(markdown, rules))


def on_page_content(html: str, **_: object) -> str:
    """Take the roles of docstrings off; the names they mark stay as code."""
    return re.sub(r":(?:attr|class|data|func|meth|mod):<code>~?", "<code>", html)


def _public_names(line: re.Match[str]) -> str:
    module = import_module(line[1])
    public = [unwrap(getattr(module, name)) for name in sorted(module.__all__) if name != name.upper()]
    # By their home: a function may be hidden by the module of the same name that it lives in.
    return "\n\n".join(f"::: {item.__module__}.{item.__qualname__}" for item in public)


def _relinked(text: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, target in rules:
        text = re.sub(pattern, target, text)
    return text

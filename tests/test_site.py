"""The site is built from the pages of the repository, whose links it rewrites."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).parent.parent
pytest.importorskip("properdocs", reason="pip install -e '.[docs]'")


@pytest.fixture(scope="module")
def hooks():
    scope: dict[str, object] = {"__file__": str(ROOT / "docs" / "site_hooks.py"), "__name__": "h"}
    exec((ROOT / "docs" / "site_hooks.py").read_text(), scope)
    return SimpleNamespace(**scope)


LINKS = [
    ("index.md", "[a](docs/api.md#calls)", "[a](api.md#calls)"),
    ("index.md", "![a](docs/images/demo.png)", "![a](images/demo.png)"),
    ("index.md", "[a](CHANGELOG.md)", "[a](changelog.md)"),
    ("faq.md", "[a](../README.md)", "[a](index.md)"),
    ("reference/kernels.md", "[a](../mathematics.md)", "[a](../mathematics.md)"),
    ("architecture.md", "[run.py](../naslora/training/run.py)", "run.py"),
    ("faq.md", "[a](https://arxiv.org)", "[a](https://arxiv.org)"),
    ("faq.md", "[a](#data)", "[a](#data)"),
    ("faq.md", "```\n[a](../setup.py)\n```", "```\n[a](../setup.py)\n```"),
]
KNOWN = "https://example.org/naslora/"  # source files are links where the repository is known


@pytest.mark.parametrize(
    "uri, link, expected, repository",
    [
        *((*row, None) for row in LINKS),
        ("a.md", "[a](../setup.py)", f"[a]({KNOWN}blob/main/setup.py)", KNOWN),
    ],
)
def test_links_lead_to_pages_of_the_site(uri, link, expected, repository, hooks):
    page = SimpleNamespace(file=SimpleNamespace(src_uri=uri))
    config = SimpleNamespace(repo_url=repository)
    assert hooks.on_page_markdown(link, page, config, None) == expected


def test_every_page_is_in_the_navigation(hooks):
    settings = (ROOT / "properdocs.yml").read_text()
    listed = set(re.findall(r": ([\w./-]+\.md)$", settings, flags=re.MULTILINE))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert listed == pages | set(hooks.PAGES)
    assert yaml.safe_load(settings)["strict"]

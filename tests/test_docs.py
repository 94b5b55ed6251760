"""The documentation is true to the tree: links, file names, modules, commands, options, levels."""

import ast
import pkgutil
import re
from functools import cache
from pathlib import Path

import pytest
from conftest import call

from naslora import cli
from naslora.methods import METHODS

ROOT = Path(__file__).parent.parent
PAGES = [
    page
    for folder in (".", "docs", "naslora/weights", "bench/experiments")
    for page in sorted(ROOT.glob(f"{folder}/*.md"))
]
SOURCES = [
    path
    for folder in ("naslora", "naslora_kernels", "csrc", "bench", "tests", "docs", "examples")
    for path in (ROOT / folder).rglob("*.*")
]
SOURCE_FILE = r"[\w.-]+\.(?:py|h|cpp|cu|cuh)"
PATH_IN_THE_TREE = r"(?:naslora|naslora_kernels|csrc|bench|tests|docs|examples)/[\w./-]+"
# Options of pip, pytest and torchrun, which the pages also use.
FOREIGN_OPTIONS = {"--benchmark-disable", "--nproc-per-node"}

# The modules and packages of docs/architecture.md, from the lowest level up. Each may import from
# lower levels.
LEVELS = {
    "naslora": (
        {"errors", "choices", "allocator"},
        {"settings", "state_dicts"},
        {"files"},
        {"locks"},
        {"records", "shapes", "adapter"},
        {"results"},
        {"methods", "sam", "data", "metrics"},
        {"report", "integrations"},
        {"training", "peft"},
        {"trained", "manifest"},
        {"study", "instances", "predictor"},
        {"prediction", "labelling"},
        {"benchmark"},
        {"exits", "arguments"},
        {"annotate"},
        {"cli"},
        {"__init__", "__main__"},
    ),
    "naslora_kernels": (
        {"cell", "operations", "tensors"},
        {"ops"},
        {"attention"},
        {"saved"},
        {"launches"},
        {"cpp", "cuda", "triton", "reference"},
        {"checks", "backends"},
        {"functional"},
        {"__init__"},
    ),
}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def spans(page: Path) -> list[str]:
    """The inline code of a page."""
    return re.findall(r"`([^`]+)`", without_blocks(read(page)).replace("\n", " "))


def blocks(page: Path) -> list[str]:
    """The code blocks of a page, with continued lines joined."""
    found = re.findall(r"^```\w*\n(.*?)^```", read(page), flags=re.DOTALL | re.MULTILINE)
    return [block.replace("\\\n", " ") for block in found]


@cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(read(page)), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def options_of(command: str) -> set[str] | None:
    """Options that a command's help lists; None if there is no such command."""
    result = call(command, "--help-all")
    methods = METHODS if command == "train" else ()
    own = (call("train", "--method", method, "--help-all").out for method in methods)
    found = set(re.findall(r"--[a-z][\w-]*", "".join([result.out, *own])))
    return found if result.status == 0 else None


def test_readme_has_at_most_170_lines():
    assert len(read(ROOT / "README.md").splitlines()) <= 170


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(read(page))):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@every_page
def test_named_files_exist(page):
    names = {path.name for path in SOURCES}
    for span in spans(page):
        if re.fullmatch(SOURCE_FILE, span):
            assert span in names, span
        elif re.fullmatch(PATH_IN_THE_TREE, span) and "DATASET" not in span:
            assert (ROOT / span).exists(), span


@every_page
def test_named_modules_and_functions_exist(page):
    for text in (*spans(page), *blocks(page)):
        for name in re.findall(r"(?<![\w./])(naslora(?:_kernels)?(?:\.\w+)+)", text):
            pkgutil.resolve_name(name)
        for name in re.findall(r"python -m ((?:bench|naslora)[\w.]*)", text):
            assert (ROOT / f"{name.replace('.', '/')}.py").exists() or name == "naslora", name


@every_page
def test_commands_and_their_options_exist(page):
    for text in (*spans(page), *blocks(page)):
        for line in re.split(r"\n|&&|\|", text):
            match = re.match(r"\s*(?:NASLORA_\w+=\S+ )?naslora ([a-z]+)\b(.*)", line.split(" #")[0])
            if match:
                known = options_of(match[1])
                assert known is not None, line
                assert set(re.findall(r"--[a-z][\w-]*", match[2])) <= known, line


@every_page
def test_options_named_alone_exist(page):
    known = set().union(*map(options_of, cli.commands()), FOREIGN_OPTIONS)
    bench = "".join(read(path) for path in (ROOT / "bench").rglob("*.py"))
    for span in spans(page):
        if match := re.match(r"--[a-z][\w-]*", span):
            assert match[0] in known or f'"{match[0]}"' in bench, span


COMMAND = re.compile(
    r"^(?:[A-Z_]+=\S+ )*(?:naslora|pip|pytest|python|make|torchrun|tensorboard|properdocs|for) ",
    re.MULTILINE,
)


@every_page
def test_every_command_is_run_or_says_why_not(page):
    """A block of commands has a mark above it; tests/test_tutorial.py runs those in bash."""
    text = read(page)
    for match in re.finditer(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        if match[1] == "" and COMMAND.search(match[2]):
            mark = re.search(r"<!-- (run by|not run:) ([^>]+) -->\n\n$", text[: match.start()])
            assert mark, match[2]
            names = re.findall(r"[\w./]+\.py|\.ci/run", mark[2])
            assert names or mark[1] == "not run:", mark[0]
            assert all((ROOT / name).exists() for name in names), mark[0]
        assert match[1] != "bash" or page.name == "tutorial.md", match[2]


@every_page
def test_recipes_make_targets_and_variables_exist(page):
    makefile = read(ROOT / "Makefile")
    code = "".join(read(p) for p in (ROOT / "setup.py", *SOURCES) if p.suffix in (".py", ".cpp"))
    for text in (*spans(page), *blocks(page)):
        for recipe in re.findall(r"--recipe ([a-z][\w/-]+)", text):
            assert (ROOT / "naslora" / "recipes" / f"{recipe}.yaml").exists(), recipe
        for target in re.findall(r"(?:^|\n)make ([\w-]+)", text):
            assert f"\n{target}:" in makefile, target
        for variable in re.findall(r"NASLORA_[A-Z_]+", text):
            assert variable.removeprefix("NASLORA_") in code, variable


def imports_between(package: str) -> set[tuple[str, str]]:
    """Pairs (module that imports, module that is imported), imports inside functions included."""
    pairs = set()
    for path in (ROOT / package).rglob("*.py"):
        module = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            parts = [name.split(".") for name in names]
            pairs |= {(module, part[1]) for part in parts if part[0] == package and len(part) > 1}
    return {pair for pair in pairs if pair[0] != pair[1]}


@pytest.mark.parametrize("package", LEVELS)
def test_modules_import_from_lower_levels_only(package):
    level = {name: number for number, names in enumerate(LEVELS[package]) for name in names}
    pairs = imports_between(package)
    known = {name for pair in pairs for name in pair} - {"_C", "_CUDA"}  # compiled
    assert known <= set(level)
    assert not [(a, b) for a, b in pairs if b in level and level[b] >= level[a]]


def test_kernels_know_nothing_of_naslora():
    for path in (ROOT / "naslora_kernels").rglob("*.py"):
        assert not re.search(r"^\s*(?:from|import) naslora\b(?!_)", read(path), re.MULTILINE), path

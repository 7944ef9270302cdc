"""The rules of docs/architecture.md that a script can check."""

import ast
import re
from pathlib import Path

import pytest

import kvfold

PACKAGE = Path(kvfold.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
METHOD_FOLDERS = ("width", "depth", "bits", "length")
MAY_IMPORT = {"attention", "errors", "grouping", "latents", "linalg", "lowrank", "number_format", "plan", "sensitivity"}
RUNTIME_NEVER = {
    *("allocate", "calibrate", "fold", "gather", "grouping", "heal", "latents", "lowrank", "pipeline"),
    *("probe", "recipe", "streaming"),
    *METHOD_FOLDERS,
}
FORBIDDEN_NAMES = ("util", "helper", "manager", "handler", "factory", "common", "misc")


def imports(file):
    """Modules of kvfold that a file imports, without the package's name."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "kvfold":
            names = [f"kvfold.{alias.name}" for alias in node.names]
        yield from (name.removeprefix("kvfold.") for name in names if name and name.startswith("kvfold."))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_sizes_docstrings_and_names(file):
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree), "the first line of a file says which question it answers"
    assert file.read_text().count("\n") <= 400
    assert not any(word in file.stem for word in FORBIDDEN_NAMES)
    assert file.parent.name in ("architectures", "bits") or not re.search(r"\d$", file.stem)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{node.name} is too long"


@pytest.mark.parametrize("folder", METHOD_FOLDERS)
def test_methods_know_no_checkpoint_and_no_other_method(folder):
    for file in (PACKAGE / folder).glob("*.py"):
        for name in imports(file):
            assert name.split(".")[0] in MAY_IMPORT or name == f"{folder}.base", f"{file.name} imports {name}"


def test_runtimes_know_no_method():
    names = [
        p.stem
        for folder in METHOD_FOLDERS
        for p in (PACKAGE / folder).glob("*.py")
        if p.stem not in ("base", "identity", "__init__")
    ]
    for file in (PACKAGE / "runtime").glob("*.py"):
        assert not {name.split(".")[0] for name in imports(file)} & RUNTIME_NEVER, file.name
        assert not [name for name in names if re.search(rf"\b{name}\b", file.read_text())], file.name


def test_only_architectures_know_tensor_names_and_model_types():
    types = [p.stem for p in (PACKAGE / "architectures").glob("*.py") if p.stem not in ("base", "__init__")]
    for file in FILES:
        if file.parent.name != "architectures":
            text = file.read_text()
            assert "self_attn" not in text, file
            assert not [t for t in types if re.search(rf"[\"']{t}[\"']", text)], file


def test_public_names_are_the_listed_ones():
    assert kvfold.__all__ == sorted(kvfold.__all__)
    assert all(hasattr(kvfold, name) for name in kvfold.__all__)


def test_the_file_tree_in_the_readme_is_complete():
    tree = (ROOT / "README.md").read_text()
    folders = {
        p
        for p in PACKAGE.rglob("*")
        if p.is_dir() and p.name != "__pycache__" and not p.is_relative_to(PACKAGE / "models")
    }
    missing = [f.relative_to(PACKAGE) for f in FILES if f.name not in tree and f.name != "__init__.py"]
    assert not missing and not [f.name for f in folders if f"{f.name}/" not in tree]


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_pages_show_the_numbers_of_results(page):
    """A table between `<!-- results/X.md -->` and `<!-- end -->` is the file's own."""
    found = re.findall(r"<!-- (results/\S+\.md) -->\n(.*?)<!-- end -->", (ROOT / page).read_text(), re.DOTALL)
    assert found
    for name, table in found:
        assert table.strip() in (ROOT / name).read_text(), name

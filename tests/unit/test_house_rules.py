"""The rules of docs/architecture.md that a script can check."""

import ast
import re
import statistics
from pathlib import Path

import pytest

import kvfold

PACKAGE = Path(kvfold.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(file for file in PACKAGE.rglob("*.py"))
CODE = {file: ast.parse(file.read_text()) for file in FILES}
BELOW = {
    "root": "",
    "plan": "root",
    "linalg": "root plan",
    "architectures": "root plan",
    "checkpoint": "root plan architectures",
    "methods": "root plan linalg",
    "runtimes": "root plan linalg architectures checkpoint",
    "calibration": "root plan linalg architectures checkpoint methods runtimes",
    "compression": "root plan linalg architectures checkpoint methods runtimes calibration",
    "evaluation": "root plan linalg architectures checkpoint methods runtimes calibration compression",
    "report": "root plan checkpoint evaluation",
    "healing": "root plan architectures checkpoint runtimes calibration compression report",
    "cli": "root plan checkpoint runtimes calibration compression evaluation report healing",
}
"""Which rooms a room may import from: the table in docs/architecture.md. There is no way up, so there is no cycle."""
AXES = ("depth", "width", "bits", "length")
FORBIDDEN_NAMES = ("util", "helper", "manager", "handler", "factory", "common", "misc")


def imports(file):
    """(module of kvfold that a file imports, name)."""
    for node in ast.walk(CODE[file]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kvfold":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "kvfold")


def room(module, name=""):
    """Of a module; `from kvfold import x` is about x."""
    parts = f"{module}.{name}".split(".") if module == "kvfold" else module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in BELOW else "root"


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_sizes_docstrings_and_names(file):
    assert ast.get_docstring(CODE[file]), "the first line of a file says which question it answers"
    assert file.read_text().count("\n") <= 350
    assert not any(word in file.stem for word in FORBIDDEN_NAMES)
    assert file.parent.name in ("architectures", "bits", "codecs") or not re.search(r"\d$", file.stem)
    for node in functions(CODE[file]):
        assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


def test_functions_are_short():
    lengths = sorted(node.end_lineno - node.lineno + 1 for tree in CODE.values() for node in functions(tree))
    assert statistics.median(lengths) <= 8 and lengths[len(lengths) * 9 // 10] <= 20


def test_rooms():
    rooms = {file.relative_to(PACKAGE).parts[0] for file in FILES if file.parent != PACKAGE}
    assert rooms == {*BELOW} - {"root"} and len(rooms) <= 12
    assert len(list(PACKAGE.glob("*.py"))) <= 8


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_room_imports_from_above(file):
    own = file.relative_to(PACKAGE).parts[0] if file.parent != PACKAGE else "root"
    if file in (PACKAGE / "__init__.py", PACKAGE / "__main__.py"):  # the front doors
        return
    for module, name in imports(file):
        assert room(module, name) in {own, *BELOW[own].split()}, f"{module} ({name})"


@pytest.mark.parametrize("axis", AXES)
def test_methods_know_no_other_method(axis):
    for file in (PACKAGE / "methods" / axis).glob("*.py"):
        for module, name in imports(file):
            assert (
                not module.startswith("kvfold.methods")
                or module in (f"kvfold.methods.{axis}.base", "kvfold.methods.low_rank")
                or f"{module}.{name}".split(".")[3][0] == "_"
            ), f"{file.name} imports {module}"


def test_only_a_runtime_asks_for_itself():
    """Nothing outside compares the name of a runtime."""
    for file in FILES:
        if not file.is_relative_to(PACKAGE / "runtimes"):
            assert not re.search(r"[!=]= *[\"']vllm[\"']", file.read_text()), file


def test_only_architectures_know_tensor_names_and_model_types():
    types = [p.stem for p in (PACKAGE / "architectures").glob("*.py") if p.stem not in ("base", "__init__")]
    for file in FILES:
        if file.parent.name != "architectures":
            text = file.read_text()
            assert "self_attn" not in text, file
            assert not [t for t in types if re.search(rf"[\"']{t}[\"']", text)], file


def test_public_names_are_the_listed_ones():
    assert all(hasattr(kvfold, name) for name in kvfold.__all__)


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_pages_show_the_numbers_of_results(page):
    """A table between `<!-- results/X.md -->` and `<!-- end -->` is the file's own."""
    found = re.findall(r"<!-- (results/\S+\.md) -->\n(.*?)<!-- end -->", (ROOT / page).read_text(), re.DOTALL)
    assert found
    for name, table in found:
        assert table.strip() and table.strip() in (ROOT / name).read_text(), name

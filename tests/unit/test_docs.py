"""Pages say what the code says, and what the README tells people to type works."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

import kvfold
from kvfold.cli.main import app
from kvfold.evaluation.demo import MODEL

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^kvfold .*$", "\n".join(re.findall(r"```\n(.*?)```", README, re.DOTALL)), re.MULTILINE)


def test_generated_pages_are_what_the_code_says():
    done = subprocess.run([sys.executable, str(ROOT / "docs/generate.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_short():
    assert README.count("\n") <= 150
    assert COMMANDS


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_readme_parse(line):
    """Every option that is shown exists and takes what is given."""
    words = shlex.split(line.split(" && ")[0], comments=True)[1:]
    group = typer.main.get_command(app)
    group.commands[words[0]].make_context(words[0], words[1:])


def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    kvfold.compress({"model": str(MODEL), "out": str(tmp_path / "folded"), "preset": "int8"}, device="cpu")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})


def test_the_wheel_works_elsewhere(tmp_path, monkeypatch):
    """Installed alone, beside the dependencies, and used from another folder: nothing of the checkout is needed."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would pack what lies there
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, cwd=tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    python = tmp_path / "env/bin/python"
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)], check=True)
    (site,) = (tmp_path / "env").glob("lib/*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))

    def kvfold_(*words):
        done = subprocess.run([tmp_path / "env/bin/kvfold", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert kvfold_("--version").strip() == kvfold.__version__
    found = subprocess.run(
        [python, "-c", "import kvfold; print(kvfold.__file__)"], cwd=tmp_path, capture_output=True, text=True
    )
    assert Path(found.stdout.strip()).is_relative_to(tmp_path)
    packaged = next(site.glob("kvfold/demo_model/books-6l"))
    kvfold_("compress", str(packaged), "--preset", "int8", "--out", "eight", "--device", "cpu")
    assert kvfold_("generate", "eight", "--prompt", "The sea", "--max-new-tokens", "4", "--device", "cpu")
    assert "llama2-7b" in kvfold_("bench", "--help")


def test_help_is_quick():
    """It imports neither torch nor transformers."""
    code = (
        "import sys; sys.argv = ['kvfold', '--help']\n"
        "from kvfold.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "compress" in done.stdout, done.stderr

"""Every example runs as its first line says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvfold.evaluation.demo import MODEL

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = Path(__file__).parents[1] / "data" / "books-valid-slice.txt"
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def run(folder, *command, said=""):
    """What a command prints, in `folder`, with the commands of this environment."""
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": paths, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [*map(str, command)], input=said, capture_output=True, text=True, cwd=folder, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """The packaged model with a chat template."""
    folder = shutil.copytree(MODEL, tmp_path_factory.mktemp("instruct") / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHAT}))
    return folder


@pytest.mark.rare
def test_fold_and_generate(tmp_path):
    said = run(tmp_path, sys.executable, EXAMPLES / "fold_and_generate.py", "out")
    assert "bytes per token instead of" in said and said.count("\n- ") == 2


def test_fold_and_chat(tmp_path, instruct):
    script, said = EXAMPLES / "fold_and_chat.py", "How do you do?\nAnd the sea?\n"
    first = run(tmp_path, sys.executable, script, instruct, "out", TEXT, said=said)
    assert first.startswith("32,768 tokens take 35 MB instead of 151 MB.\n") and first.count("\n") >= 3
    again = run(tmp_path, sys.executable, script, instruct, "out", TEXT, said=said)
    assert again == first.partition("\n")[2]


def test_the_notebook_does_what_the_script_does(tmp_path, instruct):
    """Its cells, one after the other; the first names the model."""
    cells = json.loads((EXAMPLES / "fold_and_chat.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code[0].startswith("MODEL = ") and not any(cell.get("outputs") for cell in cells)
    code[0] = f"MODEL, OUT, TEXT = {str(instruct)!r}, 'out', {str(TEXT)!r}"
    assert "instead of 151 MB" in run(tmp_path, sys.executable, "-c", "\n".join(code))


def test_long_document(tmp_path):
    (tmp_path / "document.txt").write_text(TEXT.read_text()[:6000])
    said = run(tmp_path, sys.executable, EXAMPLES / "long_document.py", "document.txt", MODEL, "out", TEXT)
    assert "1,024 tokens are held in" in said and said.count("\n- ") == 2
    held, whole = (float(word) for word in said.split() if word.replace(".", "").isdigit() and "." in word)
    assert held < 0.32 * whole


@pytest.mark.rare
def test_choose_a_budget(tmp_path):
    said = run(tmp_path, sys.executable, EXAMPLES / "choose_a_budget.py", MODEL, TEXT, "out")
    assert said.count("of the bytes: KL") == 4 and "see out/budgets.svg" in said
    assert (tmp_path / "out" / "budgets.svg").read_text().startswith("<svg")


@pytest.mark.rare
def test_fold_then_heal(tmp_path):
    options = ("--max-tokens", "8192", "--seq-len", "128", "--device", "cpu")
    said = run(tmp_path, "bash", EXAMPLES / "fold_then_heal.sh", MODEL, TEXT, TEXT, tmp_path / "healed", 2, *options)
    assert (tmp_path / "healed" / "config.json").exists() and "kl" in json.loads(said.strip().splitlines()[-1])


def test_own_method(tmp_path):
    """Installed as a package, it is one of kvfold's methods and presets."""
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target")
    source = shutil.copytree(EXAMPLES / "own-method", tmp_path / "source")  # where building leaves files
    run(tmp_path, sys.executable, *install, tmp_path / "site", source)
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); from kvfold.cli.main import main; main()"
    options = ("--preset", "finer_keys", "--set", "bits.k_bits=5", "--out", "out")
    run(tmp_path, sys.executable, "-c", code, "compress", MODEL, *options)
    plan = json.loads((tmp_path / "out" / "config.json").read_text())["kv_compression_config"]
    assert "5" in str(plan["caches"][0]["k_bits"]) and "4" in str(plan["caches"][0]["v_bits"])

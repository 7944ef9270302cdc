"""Text into sequences, from every kind of source that works offline."""

import bz2
import gzip
import json
import lzma
import os
import sys

import pytest
import torch
from tiny import load

from kvfold.calibration import text as data
from kvfold.checkpoint.tokenizer import load_tokenizer
from kvfold.errors import DataError
from kvfold.evaluation.demo import MODEL
from kvfold.runtimes.transformers.load import load_weights

SENTENCE = "The captain walked along the shore, number {}, and said nothing to the other men.\n"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture
def text():
    return "".join(SENTENCE.format(i) for i in range(2000))


def draw(tokenizer, source, **changes):
    options = {"num_samples": 16, "seq_len": 64, "seed": 0} | changes
    return data.sequences(tokenizer, str(source), **options)


def test_every_file_type_gives_the_same_text(tokenizer, text, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    with lzma.open(tmp_path / "a.txt.xz", "wt") as file:
        file.write(text)
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write(text)
    plain = draw(tokenizer, tmp_path / "a.txt")
    assert plain.shape == (16, 64)
    assert torch.equal(plain, draw(tokenizer, tmp_path / "a.txt.xz"))
    assert torch.equal(plain, draw(tokenizer, tmp_path / "a.txt.gz"))


def test_tables(tokenizer, text, tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = text.splitlines()
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))
    parquet.write_table(pyarrow.table({"body": rows}), tmp_path / "a.parquet")
    drawn = [draw(tokenizer, tmp_path / name, text_field="body") for name in ("a.jsonl", "a.parquet")]
    assert torch.equal(*drawn) and drawn[0].shape == (16, 64)
    assert "captain" in tokenizer.decode(drawn[0][3])


def test_a_data_set_comes_through_datasets(tokenizer, text, monkeypatch):
    """The hub's loader is called with name, config and split; offline its error is passed on as ours."""
    import datasets

    made = datasets.Dataset.from_dict({"text": text.splitlines()}).to_iterable_dataset()
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or made)
    assert draw(tokenizer, "some/books", config="small", split="test").shape == (16, 64)
    assert calls == [(("some/books", "small"), {"split": "test", "streaming": True})]
    monkeypatch.undo()
    with pytest.raises(DataError, match="is no local file and cannot be loaded as a data set"):
        draw(tokenizer, "nobody/nothing")


def test_sequences_do_not_overlap_and_depend_on_the_seed(tokenizer, text, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    first, other = draw(tokenizer, tmp_path / "a.txt"), draw(tokenizer, tmp_path / "a.txt", seed=1)
    assert not torch.equal(first, other)
    elements = [set(tokenizer.decode(row).split("number ")[1:]) for row in first]
    assert all(not a & b for i, a in enumerate(elements) for b in elements[:i])


def test_windows_for_evaluation(tokenizer, text, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    windows = data.first_windows(tokenizer, tmp_path / "a.txt", seq_len=50, max_tokens=120)
    assert windows.flatten().tolist() == tokenizer(text)["input_ids"][:100]
    assert data.first_windows(tokenizer, tmp_path / "a.txt", seq_len=50, max_tokens=40).shape == (1, 40)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="gives 0 tokens"):
        data.first_windows(tokenizer, tmp_path / "a.txt", seq_len=50, max_tokens=None)


def test_self_sampled_text_follows_the_model():
    model = load_weights(MODEL, "float32", "cpu")
    rows = data.sample_from_model(model, num_samples=4, seq_len=48, seed=0)
    assert rows.shape == (4, 48) and (rows[:, 0] == model.config.bos_token_id).all()
    assert torch.equal(rows, data.sample_from_model(model, num_samples=4, seq_len=48, seed=0))
    with torch.no_grad():
        loss = model(rows, labels=rows).loss.item()
    assert loss < 5  # 8.3 for tokens drawn at random


CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"


class Letters:
    """A tokenizer of letters with a chat template."""

    def __init__(self, template):
        self.chat_template = template

    def apply_chat_template(self, messages, tokenize):
        import jinja2

        return jinja2.Template(self.chat_template).render(messages=messages)

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) % 200 + 3 for letter in text]}


def test_half_of_an_instruct_models_samples_are_chats(tiny_dir):
    opening = data.chat_opening(Letters(CHATML))
    assert opening == Letters("")("<|im_start|>user ", False)["input_ids"]
    model = load(tiny_dir / "llama_mha")
    sampled = data.sample_from_model(model, num_samples=10, seq_len=30, seed=0, chat=opening)
    assert sampled.shape == (10, 30)
    assert (sampled[5:, : len(opening)] == torch.tensor(opening)).all()
    assert (sampled[:5, 0] == model.config.bos_token_id).all() and not torch.equal(sampled[5], sampled[6])


def test_models_without_chats_sample_as_ever(tiny_dir):
    assert data.chat_opening(Letters(None)) == []
    assert data.chat_opening(Letters("no words of anybody")) == []
    with pytest.warns(UserWarning, match="chat template cannot be used"):
        assert data.chat_opening(Letters("{{ raise }}{% endfor %}")) == []


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_encodings_that_files_name(tokenizer, text, tmp_path, encoding):
    (tmp_path / "plain.txt").write_text(text)
    (tmp_path / "other.txt").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    (tmp_path / "other.TXT.BZ2").write_bytes(bz2.compress(text.encode()))
    for name in ("other.txt", "other.TXT.BZ2"):
        assert torch.equal(draw(tokenizer, tmp_path / "plain.txt"), draw(tokenizer, tmp_path / name))


@pytest.mark.parametrize(
    "content",
    [
        ("naïve café " * 2000).encode("latin-1"),
        os.urandom(20_000),
        b"PK\x03\x04" + bytes(20_000),
        "text".encode("utf-16-le"),
    ],
    ids=["latin-1", "random", "zeros", "no mark"],
)
def test_what_is_no_text_is_refused(tokenizer, tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"a.txt is no text in UTF-8: .*iconv"):
        draw(tokenizer, tmp_path / "a.txt")


def test_archives(tokenizer, text, tmp_path, monkeypatch):
    """Compressed tables in capitals, and a package that is missing."""
    (tmp_path / "rows.JSONL").write_text("\n".join(json.dumps({"text": text}) for _ in range(2)))
    assert len(draw(tokenizer, tmp_path / "rows.JSONL")) == 16
    (tmp_path / "a.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match="pip install zstandard"):
        draw(tokenizer, tmp_path / "a.txt.zst")

"""`kvfold evaluate` refuses what it cannot ask before it measures anything."""

import pytest
from typer.testing import CliRunner

from kvfold.cli.main import app
from kvfold.errors import DataError, RecipeError
from kvfold.evaluation.recall import check_lengths

NOTHING = ["evaluate", "no_model", "--against", "no_model", "--data", __file__]


def test_lengths_of_recall():
    assert "--recall 64 leaves no room for passages" in str(
        CliRunner().invoke(app, [*NOTHING, "--recall", "64"]).exception
    )
    with pytest.raises(
        DataError, match="first 262,144 tokens of a text, which takes lengths up to 131,072; longer ones go"
    ):
        check_lengths([512, 200_000], __file__)
    check_lengths([512, 200_000], None)
    with pytest.raises(RecipeError, match="give lengths of 192 or more"):
        check_lengths([191], None)


def test_names_of_tasks():
    assert "no task 'no_such_task'" in str(CliRunner().invoke(app, [*NOTHING, "--tasks", "no_such_task"]).exception)

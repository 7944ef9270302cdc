"""The combinations that run by default hold every pair."""

from itertools import combinations, product

from pairwise import EVERY, chosen


def test_every_pair_of_test_model_and_variant_runs():
    cells = list(product(map("test {}".format, range(EVERY + 2)), map("model {}".format, range(15)), "abcdefg"))
    kept = [cell for cell, runs in zip(cells, chosen(cells), strict=True) if runs]
    assert len(kept) < len(cells) / EVERY * 1.1
    for i, j in combinations(range(3), 2):
        assert {(cell[i], cell[j]) for cell in kept} == {(cell[i], cell[j]) for cell in cells}


def test_what_is_no_product_runs_whole():
    cells = [("a", "llama", ""), ("a", "bloom", ""), ("b", "", "x"), ("b", "", "y"), ("c", "", "")]
    assert all(chosen(cells))


def test_few_variants_lose_none():
    cells = list(product(["a"], map(str, range(9)), "xy"))
    kept = [cell for cell, runs in zip(cells, chosen(cells), strict=True) if runs]
    assert {cell[1] for cell in kept} == set(map(str, range(9))) and {cell[2] for cell in kept} == {"x", "y"}

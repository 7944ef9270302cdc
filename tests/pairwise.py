"""Which combinations of test, model and variant run by default: every two of the three together, not every three.

Of a test that is parametrized by `model` and by something else, model i and variant j run where i + j + n is divisible by
EVERY, with n the number of the test among those that are parametrized alike. So every test meets every model and every
variant, and every model meets every variant in some test. `make test-rest` runs the others.
"""

from collections import defaultdict

EVERY = 6


def chosen(cells):
    """A bool for each (test, model, variant); tests without a model, or without anything else, have one empty."""
    models, variants = defaultdict(dict), defaultdict(dict)
    for test, model, variant in cells:
        models[test].setdefault(model, len(models[test]))
        variants[test].setdefault(variant, len(variants[test]))
    numbers, alike = {}, defaultdict(int)
    for test in models:
        kind = (*models[test], *variants[test])
        numbers[test] = alike[kind]
        alike[kind] += 1

    def runs(test, model, variant):
        every = min(EVERY, len(models[test]), len(variants[test]))
        return (models[test][model] + variants[test][variant] + numbers[test]) % every == 0

    return [runs(*cell) for cell in cells]


def cell(item):
    """(test, model, variant) of a collected test."""
    test = item.nodeid.partition("[")[0]
    call = getattr(item, "callspec", None)
    if call is None or "model" not in call.params:
        return test, item.nodeid, ""
    model = str(call.params["model"])
    return test, model, call.id.replace(model, "", 1)

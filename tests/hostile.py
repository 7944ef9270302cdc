"""What somebody may have done to a JSON document: values that are no values, fields that are gone, lists that grow."""

import copy
import math

from hypothesis import strategies as st

VALUES = st.sampled_from(
    [
        None, True, False, -1, 0, 1, 3, 2**31, 10**9, 10**30, 0.5, 1e308, -0.0, math.nan, math.inf, "", "x", "../../x",
        "/etc/passwd", "\0", "llama", "nan", "1" * 5000, [], [1], [[]], [None] * 3, {}, {"a": 1}, {"method": 5},
    ]
)  # fmt: skip
FACTORS = st.sampled_from([-1, 0, 2, 3, 0.5, 1000, 10**9])
NAMES = st.sampled_from(
    ["x", "tokens", "sliding_window", "head_dim", "rope_scaling", "quantization_config", "text_config", ""]
)


def paths(document, at=()):
    """Of everything inside."""
    inside = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in inside:
        yield (*at, key)
        yield from paths(value, (*at, key))


@st.composite
def mutated(draw, documents):
    """One of the documents with one to three changes."""
    document = copy.deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.integers(1, 3))):
        known = list(paths(document))
        if not known:
            break
        *outer, last = draw(st.sampled_from(known))
        parent = document
        for key in outer:
            parent = parent[key]
        how, number = draw(st.integers(0, 9)), parent[last]
        if how == 0:
            del parent[last]
        elif how == 1 and isinstance(parent, dict):
            parent[draw(NAMES)] = copy.deepcopy(draw(VALUES))
        elif how == 2 and isinstance(parent, list):
            parent.append(copy.deepcopy(draw(VALUES)))
        elif how <= 5 and isinstance(number, int | float) and not isinstance(number, bool):
            parent[last] = number * draw(FACTORS) if abs(number) < 1e300 else 0
        else:
            parent[last] = copy.deepcopy(draw(VALUES))
    return document

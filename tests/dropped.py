"""Folds of tiny models whose heads drop tokens."""

import kvfold
from kvfold.compression.recipe import make_recipe

FORMS = {
    "plain": ({"method": "identity"}, {"method": "identity"}),
    "int4": ({"method": "identity"}, {"method": "integer"}),
    "latents": (
        {"method": "svd_a", "latent": "group", "v_latent": "group", "group_size": 1, "multiple": 4},
        {"method": "identity"},
    ),
}
CONTEXT = 40


def folds(tiny_dir, root, common):
    """fold(model, form, **length) -> the folded folder; the same call folds once. common: fields of the length method."""
    done = {}

    def fold(model, form="plain", **length):
        key = model, form, *length.items()
        if key not in done:
            width, bits = FORMS[form]
            fields = {"model": str(tiny_dir / model), "out": str(root / f"{len(done)}"), "width": width, "bits": bits}
            fields |= {"kv_budget": 0.45 if form == "latents" else None, "context_len": CONTEXT}
            fields |= {"length": common | length, "calibration": {"data": "self", "num_samples": 4, "seq_len": 32}}
            done[key] = kvfold.compress(make_recipe(fields), run_dir=root / "run", device="cpu")
        return done[key]

    return fold

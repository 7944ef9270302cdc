"""Keys alone or values alone: what each method loses when only one side of every cache is folded, all layers alike.

    python benchmarks/one_side.py MODEL --data TEXT --valid TEXT [--markdown FILE]

Whole-layer latents. One JSON line last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from kvfold.calibration.material import layer_group
from kvfold.calibration.text import first_windows
from kvfold.checkpoint.atomic import make_folder
from kvfold.checkpoint.folder import copy_side_files
from kvfold.checkpoint.source import Source, open_source
from kvfold.checkpoint.tokenizer import load_tokenizer
from kvfold.compression.fold import fold, folded_config, folded_weights
from kvfold.compression.recipe import make_recipe, material_of
from kvfold.evaluation.texts import Evaluation, evaluate_models
from kvfold.plan.number_format import StoredShape
from kvfold.plan.plan import CachePlan, source_layer
from kvfold.runtimes.transformers.load import load_weights

METHODS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "keys": [
        ("svd_a", {}),
        ("kq_svd", {}),
        ("logit", {}),
        ("fisher", {}),
        ("palu", {}),
        ("eigen_attention", {}),
        ("fisher", {"rope": "on_read"}),
    ],
    "values": [("svd_a", {}), ("kq_svd", {}), ("logit", {}), ("fisher", {})],
}
"""logit folds values by the W_O metric with their mean in a bias, kq_svd by the W_O metric alone."""


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--share", type=int, nargs="+", default=[4, 8], help="one over the numbers kept")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--run-dir", type=Path, help="where statistics are kept")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    options = parser.parse_args()
    source = open_source(options.model)
    base = load_weights(source.checkpoint.path, "float32", "cpu")
    windows = first_windows(
        load_tokenizer(source.checkpoint.path), options.valid, seq_len=options.seq_len, max_tokens=options.max_tokens
    )
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for side, methods in METHODS.items():
            for name, fields in methods:
                for share in options.share:
                    folded = fold_one_side(source, options, side, name, fields, share, Path(scratch))
                    found: Evaluation = evaluate_models(
                        load_weights(folded[0], "float32", "cpu"), base, windows, folded[1]
                    )
                    label = ", ".join([name, *(f"{key}: {value}" for key, value in fields.items())])
                    rows.append((side, f"1/{share}", label, f"{found.loss_change:+.4f}", f"{found.kl:.4f}"))
                    print(rows[-1], flush=True)
    rows.sort(key=lambda row: row[:2])
    lines = [
        f"`{source.checkpoint.path.name}`, one side of every cache folded, one latent per layer; calibrated on"
        f" {Path(options.data).name} ({options.num_samples} x {options.seq_len} tokens), evaluated on {options.valid.name},"
        f" {options.max_tokens} tokens.",
        "",
        "| side | numbers kept | method | loss change | KL |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")
    print(json.dumps({"rows": rows}))


def fold_one_side(
    source: Source, options: argparse.Namespace, side: str, name: str, fields: dict[str, Any], share: int, scratch: Path
) -> tuple[Path, CachePlan]:
    """A folded model whose other side keeps all numbers."""
    calibration = {"data": options.data, "num_samples": options.num_samples, "seq_len": options.seq_len}
    out = scratch / f"{side}-{name}-{'-'.join(map(str, fields.values()))}-{share}"
    width = {"method": name, "v_latent": "layer"} | fields
    recipe = make_recipe(
        {"model": options.model, "out": str(out), "width": width, "calibration": calibration, "kv_budget": 1}
    )
    method, targets = recipe.method("width"), (None,) * len(source.layers)
    statistics = material_of(recipe, source, options.run_dir or scratch / "run").statistics(method.needs)
    caches = []
    for layer in source.layers:
        full = StoredShape(1, layer.num_kv_heads * layer.head_dim)
        small = StoredShape(1, full.width // share)
        caches.append(method.spec(layer, *((small, full) if side == "keys" else (full, small))))
    plan = CachePlan(
        dtype=source.dtype,
        source=tuple(source_layer(layer) for layer in source.layers),
        caches=tuple(caches),
        kv_sharing_target_layer=targets,
    )
    make_folder(out)
    config = folded_config(source.checkpoint, source.arch, plan)
    copy_side_files(source.checkpoint, out)
    fold(
        source.checkpoint,
        source.arch,
        source.layers,
        plan,
        lambda owner: folded_weights(
            method, layer_group(source, targets, owner, statistics, method), plan.cache_of(owner)
        ),
        out,
        config,
    )
    return out, plan


if __name__ == "__main__":
    main()

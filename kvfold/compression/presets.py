"""Paper names as recipe fragments: a preset is a point on the four axes, given as data."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Any

from kvfold import registry
from kvfold.errors import RecipeError


@dataclass(frozen=True)
class Preset:
    """A named recipe fragment and where it comes from."""

    about: str
    fragment: dict[str, Any]


def _mlkv(owners: int, kv_heads: int) -> Preset:
    about = f"the MLKV paper's Pythia-160M with {owners} caches of {kv_heads} heads"
    depth = {"method": "contiguous", "owners": owners}
    return Preset(about, {"depth": depth, "width": {"method": "mean_pool", "kv_heads": kv_heads}})


MLKV_PAPER = {
    "MHA-144": _mlkv(12, 12),
    "GQA-48": _mlkv(12, 4),
    "MLKV-48": _mlkv(4, 12),
    "MQA-12": _mlkv(12, 1),
    "MLKV-12": _mlkv(4, 3),
    "MLKV-6": _mlkv(6, 1),
    "MLKV-4": _mlkv(4, 1),
    "MLKV-2": _mlkv(2, 1),
    "MLKV-1": _mlkv(1, 1),
}
"""The nine configurations of arXiv 2406.09297, named by their number of key/value heads in 12 layers of 12."""


def _scored(rule: str, says: str) -> Preset:
    """As published: equally many tokens in every head."""
    return Preset(says, {"length": {"method": "scored", "rule": rule, "sharing": "equal"}})


def _plain(bits: int) -> Preset:
    about = f"the cache as it is in {bits} bits, one scale per token and head"
    return Preset(
        about, {"width": {"method": "identity"}, "bits": {"method": "integer", "k_bits": bits, "v_bits": bits}}
    )


def _turboquant(k_bits: int, v_bits: int) -> Preset:
    """As vLLM's cache dtypes; keys of 8 bits are float8, which vLLM does not turn. vLLM also keeps the first two and the last
    two layers as they are, which is the recipe's `keep_layers`."""
    keys = "float8" if k_bits == 8 else f"turned, {k_bits} bits by Lloyd-Max levels"
    width = {"method": "identity"} if k_bits == 8 else {"method": "orthogonal", "sides": "keys"}
    return Preset(
        f"keys {keys}, values {v_bits} bits (TurboQuant, arXiv 2504.19874, in vLLM's form; vLLM also keeps two layers at"
        " either end: keep_layers)",
        {"width": width, "bits": {"method": "turboquant", "k_bits": k_bits, "v_bits": v_bits}},
    )


PRESETS = {
    "auto": Preset(
        "latents of keys and values in few bits, apart from a quarter of the bytes on, of both below that (of one per layer"
        " what layers below say is left out), shared out by expected nats, the newest tokens finely beside (the default)",
        {
            "width": {"method": "mla"},
            "bits": {"method": "mixed"},
            "length": {"method": "recent"},
            "allocate": "greedy",
            "calibration": {"data": "self"},
        },
    ),
    "identity": Preset("the cache as it is, under kvfold's runtime (a control)", {"width": {"method": "identity"}}),
    "gqa": Preset("mean-pooled key/value heads (arXiv 2305.13245)", {"width": {"method": "mean_pool"}}),
    "mqa": Preset("one mean-pooled key/value head per layer", {"width": {"method": "mean_pool", "kv_heads": 1}}),
    "svd_w": Preset("low rank by SVD of the weights (baseline of arXiv 2406.07056)", {"width": {"method": "svd_w"}}),
    "svd_a": Preset("low rank by SVD of activations (arXiv 2406.07056)", {"width": {"method": "svd_a"}}),
    "procrustes": Preset(
        "heads aligned, then merged; the result is stock grouped-query attention (after arXiv 2412.20677)",
        {"width": {"method": "procrustes"}},
    ),
    "kq_svd": Preset(
        "low rank of each head's scores (KQ-SVD, arXiv 2512.05916)",
        {"width": {"method": "kq_svd", "latent": "group", "group_size": 1}},
    ),
    "palu": Preset(
        "low rank of keys before rotation, in groups of four heads (Palu, arXiv 2407.21118)",
        {"width": {"method": "palu", "latent": "group", "group_size": 4}},
    ),
    "eigen_attention": Preset(
        "low rank of keys and queries together (Eigen Attention, arXiv 2408.05646)",
        {"width": {"method": "eigen_attention", "v_latent": "layer"}},
    ),
    "fast": Preset(
        "latents of rotated keys, which kernels read as they lie; widths by expected nats",
        {"width": {"method": "fisher"}, "allocate": "greedy"},
    ),
    "served": Preset(
        "latents in heads of ordinary size, which vLLM's own kernels read; sizes by expected nats",
        {
            "width": {"method": "fisher", "latent": "group", "v_latent": "group"},
            "allocate": "greedy",
            "runtime": "vllm",
            "calibration": {"data": "self"},
        },
    ),
    "small": Preset(
        "latents of keys before rotation, rebuilt on read; widths by expected nats",
        {"width": {"method": "fisher", "rope": "on_read"}, "allocate": "greedy"},
    ),
    "streaming_llm": Preset(
        "the first four tokens and the newest, equally many in every head (StreamingLLM, arXiv 2309.17453)",
        {"length": {"method": "recency", "sharing": "equal"}},
    ),
    "duo_attention": Preset(
        "some heads keep every token, the others the first and the newest; which, by expected nats (after DuoAttention, arXiv"
        " 2410.10819)",
        {"length": {"method": "recency", "sharing": "classes"}, "calibration": {"data": "self"}},
    ),
    "windows": Preset(
        "every head keeps the first tokens and the newest, as many as it needs, by expected nats",
        {"length": {"method": "recency"}, "calibration": {"data": "self"}},
    ),
    "observed": Preset(
        "every head keeps of a prompt what its own queries, asked behind it, would miss most, and lets it stand for the rest;"
        " how many by expected nats",
        {"length": {"method": "scored", "rule": "observed", "matched": True}, "calibration": {"data": "self"}},
    ),
    "foreseen": Preset(
        "every head keeps what the layer's input says will be worth most when a token comes, generated ones too; how many by"
        " expected nats",
        {"length": {"method": "foreseen"}, "calibration": {"data": "self"}},
    ),
    "snapkv": _scored(
        "snapkv", "what the last 64 queries of a prompt attend to, and its neighbours (SnapKV, arXiv 2404.14469)"
    ),
    "pyramidkv": Preset(
        "as snapkv, with fewer tokens from layer to layer (PyramidKV, arXiv 2406.02069)",
        {"length": {"method": "scored", "rule": "snapkv", "sharing": "pyramid"}},
    ),
    "adakv": Preset(
        "as snapkv, with heads of a layer that compete for its tokens by what they attend to; how many a head gets by"
        " calibration text, where the paper's compete in every prompt (after Ada-KV, arXiv 2407.11550)",
        {"length": {"method": "scored", "rule": "snapkv", "sharing": "ada"}, "calibration": {"data": "self"}},
    ),
    "h2o": _scored("h2o", "what got the most attention from all queries of a prompt (H2O, arXiv 2306.14048)"),
    "tova": _scored("tova", "what the last query of a prompt attends to (TOVA, arXiv 2401.06104)"),
    "expected_attention": _scored(
        "expected_attention",
        "what queries as the prompt's would attend to behind it (Expected Attention, arXiv 2510.00636)",
    ),
    "kvzip": Preset(
        "what gets the most attention when a prompt is read a second time; how much a head keeps by expected nats, where the"
        " paper's heads compete for it at run time (after KVzip, arXiv 2505.23416)",
        {"length": {"method": "scored", "rule": "kvzip"}, "calibration": {"data": "self"}},
    ),
    "keydiff": _scored("keydiff", "tokens of a prompt whose keys differ from the others (KeyDiff, arXiv 2504.15364)"),
    "knorm": _scored("knorm", "tokens of a prompt whose keys are short (arXiv 2406.11430)"),
    "lead": Preset(
        "every token is stored; a step reads those that the first numbers of low-rank keys choose (after Loki, arXiv"
        " 2406.02542)",
        {"width": {"method": "kq_svd", "latent": "group", "group_size": 1}, "length": {"method": "lead"}},
    ),
    "quest": Preset(
        "every token is stored; a step reads the pages whose keys could score most (Quest, arXiv 2406.10774)",
        {"width": {"method": "identity"}, "length": {"method": "pages"}},
    ),
    "magicpig": Preset(
        "every token is stored; a step reads those whose signatures collide with the query's (MagicPIG, arXiv 2410.16179)",
        {"width": {"method": "identity"}, "length": {"method": "lsh"}},
    ),
    "sampled": Preset(
        "every token is stored; a step draws those that it reads by what the first numbers of low-rank keys foretell",
        {"width": {"method": "kq_svd", "latent": "group", "group_size": 1}, "length": {"method": "sampled"}},
    ),
    **{f"int{bits}": _plain(bits) for bits in (8, 4, 3, 2)},
    "int4_rotated": Preset(
        "int4 with every head turned by an orthogonal matrix (after QuaRot, arXiv 2404.00456)",
        {"width": {"method": "orthogonal"}, "bits": {"method": "integer"}},
    ),
    "fp8": Preset("the cache as it is in float8 e4m3", {"width": {"method": "identity"}, "bits": {"method": "fp8"}}),
    "kivi": Preset(
        "2 bits, keys per channel and values per token (after KIVI, arXiv 2402.02750)",
        {"width": {"method": "identity"}, "bits": {"method": "kivi"}},
    ),
    "turboquant_k8v4": _turboquant(8, 4),
    "turboquant_4bit_nc": _turboquant(4, 4),
    "turboquant_k3v4_nc": _turboquant(3, 4),
    "turboquant_3bit_nc": _turboquant(3, 3),
    "kvtc": Preset(
        "principal components of keys before rotation and of values, in mixed bits (KVTC, arXiv 2511.01815, without entropy"
        " coding and exact tokens)",
        {"width": {"method": "kvtc"}, "bits": {"method": "mixed"}, "allocate": "greedy"},
    ),
    "mlkv": Preset(
        "neighbouring layers share mean-pooled heads (arXiv 2406.09297)",
        {"depth": {"method": "contiguous"}, "width": {"method": "mean_pool"}},
    ),
    "cla": Preset(
        "every two (or more) layers share mean-pooled heads (arXiv 2405.12981)",
        {"depth": {"method": "cla"}, "width": {"method": "mean_pool"}},
    ),
    "shared": Preset(
        "layers that predict each other well share a cache, by regression on its owner",
        {"depth": {"method": "measured"}, "width": {"method": "logit", "v_latent": "layer"}},
    ),
    "xkv": Preset(
        "four layers fill one latent together (after arXiv 2503.18893)",
        {"depth": {"method": "cla", "factor": 4}, "width": {"method": "cross_layer"}},
    ),
} | MLKV_PAPER

EXTRAS = {"autoencoder": "kvfold-autoencoder"}
"""Presets of packages in extras/, by the package that brings them."""


def find_preset(name: str) -> Preset:
    """kvfold's own, or that of an installed package. Raises RecipeError with the nearest name."""
    if name in PRESETS:
        return PRESETS[name]
    if name in (foreign := _foreign()):
        return foreign[name].load()
    if name in EXTRAS:
        package = EXTRAS[name]
        raise RecipeError(
            f"preset {name!r} comes with the package {package}, which is not installed: pip install ./extras/{package} in"
            " kvfold's repository."
        )
    raise RecipeError(registry.unknown("preset", name, [*PRESETS, *foreign]))


def all_presets() -> dict[str, Preset]:
    """kvfold's own and those of other packages (entry points of the group `kvfold.presets`, which lead to a `Preset`)."""
    return {name: find_preset(name) for name in (*PRESETS, *_foreign())}


def _foreign() -> dict[str, importlib.metadata.EntryPoint]:
    return registry.entry_points("kvfold.presets", PRESETS)

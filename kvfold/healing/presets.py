"""Recovery recipes of the papers as data, for `kvfold heal --preset`."""

from __future__ import annotations

from kvfold.compression.presets import Preset

HEALING_PRESETS = {
    "mlkv": Preset(
        "uptraining of arXiv 2406.09297: all weights, next token, decay 0.01, peak 6e-4 after a fifth of the steps",
        {
            "objective": "ce",
            "train": "all",
            "learning_rate": 6e-4,
            "warmup": 0.2,
            "weight_decay": 0.01,
            "adam_beta2": 0.95,
            "batch_size": 12,
            "accumulate": 2,
        },
    ),
    "svd_a": Preset(
        "LoRA of arXiv 2406.07056: rank 256, alpha 512, dropout 0.05, 4e-5, decay 0.05, 64 rows per step",
        {
            "objective": "ce",
            "train": "lora",
            "lora_rank": 256,
            "lora_alpha": 512,
            "lora_dropout": 0.05,
            "learning_rate": 4e-5,
            "weight_decay": 0.05,
            "adam_beta2": 0.999,
            "batch_size": 1,
            "accumulate": 64,
        },
    ),
    "distil": Preset(
        "KL to the original's distribution, attention only",
        {"objective": "kd", "train": "attention", "learning_rate": 3e-4},
    ),
}

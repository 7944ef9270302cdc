"""What folded folders call themselves in config.json."""

CONFIG_KEY = "kv_compression_config"
"""The key under which the plan lives."""
MODEL_TYPE_PREFIX = "kvfold_"
"""Goes before the source's model_type."""

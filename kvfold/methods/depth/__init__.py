"""Which layers own a cache and which read it: cross-layer sharing of keys and values."""

"""Which tokens stay: eviction."""

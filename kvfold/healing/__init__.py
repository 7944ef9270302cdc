"""Recovery training of a folded model."""

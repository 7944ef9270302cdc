"""The transformers runtime: it reads a plan and weights, and knows no method."""

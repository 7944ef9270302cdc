"""Text and the original model -> statistics on disk."""

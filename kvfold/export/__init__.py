"""Checkpoints that need no kvfold to load."""

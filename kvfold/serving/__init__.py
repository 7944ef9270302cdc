"""Servers that load a folded folder."""

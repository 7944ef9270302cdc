"""Folded models in transformers. Importing it teaches the Auto classes to load them; nothing is patched."""

from kvfold.runtimes.transformers.modeling import register

register()

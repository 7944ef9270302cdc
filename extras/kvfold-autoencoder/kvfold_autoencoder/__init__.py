"""Latents by small networks instead of matrices: a width method and a preset of kvfold, found by entry points."""

from kvfold.compression.presets import Preset

PRESET = Preset("small networks beside the latents, trained on calibration text", {"width": {"method": "autoencoder"}})

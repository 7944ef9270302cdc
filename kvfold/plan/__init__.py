"""The nouns and the format on disk: layers, tensors, cache specs, number formats, bytes, checks. Nothing runs here."""

"""Axis `depth`: which layers own a cache, and which read an earlier layer's. One file is one method."""

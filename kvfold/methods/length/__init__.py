"""Axis `length`: which tokens stay in a cache. One file is one method."""

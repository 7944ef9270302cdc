"""Axis `width`: how many numbers one cache stores per token. One file is one method."""

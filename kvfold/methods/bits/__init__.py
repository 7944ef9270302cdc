"""Axis `bits`: how many bits a stored number takes. One file is one method."""

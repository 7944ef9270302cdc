"""The four axes, one file per method: depth, width, bits, length. No files, no model types, no runtime."""

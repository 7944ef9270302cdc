"""Everything that writes a folder with another cache: compress, truncate, export, import."""

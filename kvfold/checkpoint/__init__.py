"""Model folders on disk: read with every fault named, written whole or not at all."""

"""Codecs of packed numbers and attention over them: in torch, C++ and Triton."""

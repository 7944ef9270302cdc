"""Matrices in, matrices out: moments, eigenproblems, reduced-rank regression, sensitivities, bases to quantize in."""

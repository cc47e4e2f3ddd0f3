"""Tensors in, tensors out: moments, spectra and the one linear system."""

"""The default grids of the search for merge settings (arXiv 2504.13237, appendix C)."""

LAMBDAS = (0.4, 0.6, 0.8, 1.0, 1.2)
TRIMS = (0.4, 0.6, 0.8)
DENSITIES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)

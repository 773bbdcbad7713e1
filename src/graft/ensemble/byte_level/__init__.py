"""Exact byte-level probabilities from models over any tokens, and ensembles of them."""

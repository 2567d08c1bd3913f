"""Proofs of the search: tables of real rung results, simulations on them, comparisons side by side."""

"""Proofs of the search: cells of a matrix kept in results.jsonl, tables of real rung results, simulations on them."""

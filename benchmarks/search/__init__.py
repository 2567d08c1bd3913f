"""Proofs of the search: cells of a matrix, one run each, kept in results.jsonl; see benchmarks/README.md."""

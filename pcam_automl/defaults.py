"""Defaults that the command line shows and the search obeys. Imports nothing: it is read at every start."""

MAX_RETRIES = 3
"""Deaths of its worker that a trial survives: more than that, and it is likely what kills them."""

"""Side-by-side measurements. Each prints a table and writes JSON; ratios come from one run with both sides in turn."""

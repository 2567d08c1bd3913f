"""Long tests of survival: what tests/faults checks in seconds, here with the counts that were promised."""

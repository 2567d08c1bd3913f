"""From a folder of patches to a pack, splits and a synthetic set. Imports no torch."""

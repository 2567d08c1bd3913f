"""From a study's best trials to the final network: its recipe, its members, its figures. `pcam_automl/finalize.py` calls it."""

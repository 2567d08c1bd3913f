"""`python -m pcam_automl`: the same as `pcam-automl`."""

from pcam_automl.cli import run

if __name__ == "__main__":
    run()

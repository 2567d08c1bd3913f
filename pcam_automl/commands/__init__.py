"""Bodies of the commands: they call the layers below and print. Options are declared in cli.py."""

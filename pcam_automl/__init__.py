"""AutoML for PatchCamelyon: honest splits, fast training, searches that lose nothing."""

__version__ = "0.1.0"

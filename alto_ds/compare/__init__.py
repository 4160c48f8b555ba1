"""Which optimizer is better, all treated alike? ``python -m alto_ds.compare``."""

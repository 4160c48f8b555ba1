"""What does a training run take, before anybody pays for it? ``python -m alto_ds.plan``."""

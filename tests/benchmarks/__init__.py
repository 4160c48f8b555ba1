"""What ALTO costs beside what users would otherwise pick: ``python -m tests.benchmarks``."""

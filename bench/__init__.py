"""Benchmarks of rnnfast against its peers: ``python -m bench compare`` (see bench/README.md)."""

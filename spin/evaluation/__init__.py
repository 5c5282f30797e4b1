"""Benchmarks of a trained model."""

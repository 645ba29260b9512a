"""Benchmarks: measured side by side in one run, medians and spread, never part of the tests."""

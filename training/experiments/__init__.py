"""Experiments on test subjects, with baselines: `python -m training.experiments`."""

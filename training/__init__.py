"""Healthy scans -> a bundle that the service can serve."""

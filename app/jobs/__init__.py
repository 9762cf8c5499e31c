"""Durable jobs: what is kept on disk, and the workflow that turns a scan into its results."""

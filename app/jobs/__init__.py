"""Durable jobs: the queue, the DBOS workflow, the worker, crash recovery and the store of scans and results."""

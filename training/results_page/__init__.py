"""Writer of docs/RESULTS.md, the results on one page."""

"""The paper's experiments and its opponents, on subjects that chose nothing: `python -m training.experiments`."""

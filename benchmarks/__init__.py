"""Time, accuracy and memory of the service beside its peers: `python -m benchmarks`. No part of what is shipped."""

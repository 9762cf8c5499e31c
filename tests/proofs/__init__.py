"""Scripts that prove a property of the whole service: `python -m tests.proofs.NAME`."""

from tests.support.search_path import leave_environments

leave_environments()

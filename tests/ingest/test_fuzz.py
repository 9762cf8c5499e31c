"""Short fuzz test with mutants of real files."""

from pathlib import Path

import pytest

from tests.proofs.fuzz_ingest import fuzz, seeds

COUNT, SEED = 300, 20261123


@pytest.mark.data
def test_every_mutant_is_read_or_refused(real_scans: Path, tmp_path: Path) -> None:
    outcome = fuzz(seeds(real_scans, tmp_path), COUNT, SEED)
    assert outcome.findings == []
    assert outcome.codes.total() == COUNT
    # The mutants reach the decoders, not only the detection of the format.
    assert outcome.codes["read"] > COUNT / 10
    assert len(outcome.codes) >= 6

"""Tests of intervals and shares on the pages of the evaluation."""

import numpy as np

from training.cluster_bootstrap import Interval
from training.formats import show_interval, show_share


def test_share_of_few_scans_has_no_interval() -> None:
    assert show_share(1, 2) == "1 of 2"
    assert show_share(15, 15) == "15 of 15 (78 to 100 %)"


def test_value_without_an_interval_is_shown_alone() -> None:
    assert show_interval(Interval(0.5, 0.4, 0.75)) == "0.50 (0.40 to 0.75)"
    assert show_interval(Interval(0.5, np.nan, np.nan)) == "0.50"
    assert show_interval(Interval(np.nan, 0.4, 0.75)) == ""
    assert show_interval(None) == ""

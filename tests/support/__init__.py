"""Fixtures that tests share: a synthetic head, exact networks, and a tiny bundle of them."""

"""Numbers of people as the page shows them."""

from training.results_page.groups import Healthy

NO_VALUE = "not measured"
# The number of people is not known, because the images of MedNIST have no patient.
STACKS = {"headct": "stacks"}


def number_of(group: Healthy) -> str:
    """Return the number of people, or of stacks if the people are not known."""
    return f"{group.scans} {STACKS.get(group.model, '')}".strip()

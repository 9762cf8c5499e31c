"""`python -m training.experiments all`, or some of its parts."""

import argparse

from training.experiments.report import write
from training.experiments.runner import PARTS


def main() -> None:
    """Run parts of the experiments; what was measured before is kept."""
    parser = argparse.ArgumentParser(prog="python -m training.experiments", description=__doc__)
    parser.add_argument(
        "parts", nargs="+", choices=["all", "report", *PARTS], help="which parts; report writes the page"
    )
    parser.add_argument("--methods", nargs="*", default=[], help="only these methods, by name")
    options = parser.parse_args()
    for part in PARTS if "all" in options.parts else [p for p in options.parts if p in PARTS]:
        PARTS[part](options.methods)
        write()
    write()


if __name__ == "__main__":
    main()

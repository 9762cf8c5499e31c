"""`python -m benchmarks`: all parts in one run, then docs/BENCHMARKS.md with its figures and its JSON.

Processes of the rows import this module again: nothing heavy at its top.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "training" / "configs" / "t1.toml")
    parser.add_argument("--bundle", type=Path, help="folder of the bundle; else the newest of the configuration's name")
    parser.add_argument("--scan", type=Path, help="else sub-61 of the configuration's data")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sample", type=int, help="slices of the sampled rows, in place of their own number")
    parser.add_argument("--cases", type=int, default=4, help="synthetic lesions, 0 for no accuracy")
    parser.add_argument("--rows", nargs="*", help="names of rows; all of them by default")
    parser.add_argument("--parts", nargs="*", help="names of parts; the others stay as an earlier run found them")
    parser.add_argument("--quick", action="store_true", help="the least of everything: to see that it works")
    parser.add_argument("--thorough", action="store_true", help="with the accuracy of 500 steps: minutes a case")
    parser.add_argument("--render", action="store_true", help="write the page from the JSON, and measure nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the page")
    from benchmarks.run import run

    run(parser.parse_args(sys.argv[1:]))


if __name__ == "__main__":
    main()

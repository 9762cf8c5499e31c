"""Command that compares Counterpart with other methods and writes docs/BENCHMARKS.md with its JSON and figure.

A run measures all parts (rows, waterfall, volume, ct), which takes about 15 minutes on two cores.
"""

# Each row runs in a spawned process that imports this module again, so heavy imports stay inside `main`.
import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Parse the command line and run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "training" / "configs" / "t1.toml")
    parser.add_argument("--bundle", type=Path, help="bundle folder (default: newest bundle of the configuration)")
    parser.add_argument("--scan", type=Path, help="T1 volume (default: sub-61 of the configuration's data)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sample", type=int, help="number of slices to time in sampled rows (default: set by row)")
    parser.add_argument("--cases", type=int, default=4, help="number of synthetic lesions, 0 skips the accuracy")
    parser.add_argument("--rows", nargs="*", help="names of the rows to measure (default: all)")
    parser.add_argument("--parts", nargs="*", help="parts to measure (the others keep their earlier results)")
    parser.add_argument("--quick", action="store_true", help="measure as little as possible, to test the benchmark")
    parser.add_argument("--thorough", action="store_true", help="also measure the accuracy of slow rows")
    parser.add_argument("--render", action="store_true", help="write the page from the JSON without measuring")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the page")
    from benchmarks.run import run

    run(parser.parse_args())


if __name__ == "__main__":
    main()

"""`python -m jobs.compare RUN_A RUN_B [RUN_C ...]`: finished evaluations side by side; the first is the base.

Exit code 0: done, and all thresholds hold; 1: one does not; 2: a run or a threshold can't be used.
"""

import argparse
import sys
from collections.abc import Sequence

from udrl.errors import exit_code


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.compare",
        description="Finished evaluations side by side, paired on the intents that all of them have; the first is the base.",
        epilog="exit code: 0 all thresholds hold, 1 one does not, 2 a run or a threshold can't be used",
    )
    parser.add_argument("base", metavar="RUN_A", help="storage of a run, or the folder of its evaluation")
    parser.add_argument("candidates", metavar="RUN_B", nargs="+", help="the runs to compare with it")
    parser.add_argument("--thresholds", metavar="FILE", help="YAML list of rules; one that fails makes the exit code 1")
    parser.add_argument("--out", metavar="FOLDER", help="write compare.txt and compare.json there")
    parser.add_argument("--policy", default="student", help="whose outputs are compared (default: student)")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON, as the last line")
    options = parser.parse_intermixed_args(argv)

    from udrl import storage
    from udrl.evaluate.compare import thresholds
    from udrl.evaluate.compare.comparison import compare, plain_text
    from udrl.evaluate.compare.evaluated_runs import load_runs

    rules = thresholds.load_rules(options.thresholds) if options.thresholds else []
    comparison = compare(load_runs([options.base, *options.candidates]), options.policy)
    for warning in comparison.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    comparison.thresholds = thresholds.check(rules, comparison)
    print(plain_text(comparison))
    if options.out:
        storage.write_bytes(storage.join(options.out, "compare.txt"), plain_text(comparison).encode())
        comparison.save(storage.join(options.out, "compare.json"))
    if options.json:
        print(comparison.model_dump_json())
    if not all(verdict.holds for verdict in comparison.thresholds):
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""`python -m jobs.compare RUN_A RUN_B [RUN_C ...]`: finished evaluations side by side; the first is the base.

Exit code 0: done, and all thresholds hold; 1: one does not; 2: something to mend.
"""

import argparse
import sys
from collections.abc import Sequence

from udrl.errors import exit_code


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.compare",
        description="Finished evaluations side by side, paired on the intents that all of them have; the first is the base.",
        epilog="exit code: 0 all thresholds hold, 1 one does not, 2 something to mend",
    )
    parser.add_argument("base", metavar="RUN_A", help="storage of a run, or the folder of its evaluation")
    parser.add_argument("others", metavar="RUN_B", nargs="+", help="the runs to hold against it")
    parser.add_argument("--thresholds", metavar="FILE", help="YAML list of rules; one that fails makes the exit code 1")
    parser.add_argument("--out", metavar="FOLDER", help="write compare.md and compare.json there")
    parser.add_argument("--policy", default="student", help="whose outputs are compared (default: student)")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON, as the last line")
    given = parser.parse_intermixed_args(argv)

    from udrl import storage
    from udrl.evaluate.compare import comparison as compare
    from udrl.evaluate.compare import side_by_side as beside
    from udrl.evaluate.compare import thresholds

    rules = thresholds.load(given.thresholds) if given.thresholds else []
    document = compare.compare(compare.load([given.base, *given.others]), given.policy)
    for warning in [*document["warnings"], *thresholds.doubts(rules, document)]:
        print(f"warning: {warning}", file=sys.stderr)
    print(beside.text(document))
    verdicts = thresholds.check(rules, document)
    lines = [beside.verdict(document, verdict) for verdict in verdicts]
    failing = [line for verdict, line in zip(verdicts, lines, strict=True) if not verdict.holds]
    document["thresholds"] = [verdict._asdict() for verdict in verdicts]
    if rules:
        print("\n".join(["", *failing, f"thresholds: {len(lines) - len(failing)} of {len(lines)} hold"]))
    if given.out:
        storage.write_bytes(storage.join(given.out, "compare.md"), beside.markdown(document, lines).encode())
        storage.write_json(storage.join(given.out, "compare.json"), document)
    if given.json:
        print(compare.one_line(document))
    if failing:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""Compare results of evaluate.py: what differs between them, then their scores.

Results with the same questions are compared in pairs by McNemar's exact test. p: if both solve questions equally often,
the probability of a split at least as uneven among the questions that only one solved.
"""

import sys
from collections.abc import Sequence
from itertools import accumulate, combinations
from string import ascii_uppercase
from typing import Any

from data.terminal import Parser, ending_in_one_line, printable, table
from launch.results import identity, read_result, score_table, settings


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p-value of McNemar's exact test, a binomial test with probability 1/2.

    McNemar, Note on the sampling error of the difference between correlated proportions, Psychometrika 1947.

    Args:
        only_a, only_b: numbers of questions that only one of two results solved.
    """
    n = only_a + only_b
    binomials = accumulate(range(min(only_a, only_b)), lambda before, k: before * (n - k) // (k + 1), initial=1)
    return min(1.0, 2 * sum(binomials) / 2**n)


def compare_results(places: Sequence[str]) -> None:
    """Print what differs between results, their scores, and paired tests.

    Args:
        places: evaluation.json files, or directories with one.

    Raises:
        ValueError: fewer than 2 results or more than 26, one that cannot be read, or no task that two of them share.
    """
    if not 2 <= len(places) <= len(ascii_uppercase):
        raise ValueError(
            f"{len(places)} results: give 2 to {len(ascii_uppercase)} evaluation.json files or directories"
        )
    results = dict(zip(ascii_uppercase, map(read_result, places), strict=False))
    tasks = dict.fromkeys(task for result in results.values() for task in result["scores"])
    by_task = {task: [name for name in results if task in results[name]["scores"]] for task in tasks}
    if not any(names[1:] for names in by_task.values()):
        had = "; ".join(
            f"{place} has {', '.join(results[name]['scores'])}" for name, place in zip(results, places, strict=True)
        )
        raise ValueError(f"no task is in two of the results: {had}")
    for name, place in zip(results, places, strict=True):
        print(printable(f"{name}  {place}"))
    print("\n" + _differing(results))
    rows = [((task, name), results[name]["scores"][task]) for task, names in by_task.items() for name in names]
    print("\n" + score_table(rows, ("task", "result")) + "\n")
    for task, names in by_task.items():
        for a, b in combinations(names, 2):
            print(printable(f"{task}, {a} and {b}: {_pair(task, results[a], results[b])}"))


def _differing(results: dict[str, dict[str, Any]]) -> str:
    """Table of the settings, versions, digests and devices that differ, leaving out those of a single result."""
    facts = [settings(result) | identity(result) | {"ranks": result["ranks"]} for result in results.values()]
    rows = []
    for name in dict.fromkeys(name for each in facts for name in each):
        texts = [str(each[name]) if name in each else None for each in facts]
        if len({*texts} - {None}) > 1:
            rows.append([name, *texts])
    return table([["differs", *results], *rows]) if rows else "no setting, version, digest or device differs"


def _pair(task: str, a: dict[str, Any], b: dict[str, Any]) -> str:
    """A line on the questions of a task that only one of two results solved."""
    if a["origin"][f"rows of {task}"] != b["origin"][f"rows of {task}"]:
        return "other questions, so no paired test"
    pairs = [(x["right"], y["right"]) for x, y in zip(a["answers"][task], b["answers"][task], strict=True)]
    only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
    p = mcnemar(only_a, only_b)
    solved = f"of the same {len(pairs)} questions only the first solved {only_a}, only the second {only_b}"
    return f"{solved}; McNemar's exact p = {p:.2g}"


def main(arguments: Sequence[str]) -> None:
    """Compare the results that the command line names."""
    parser = Parser("launch.compare", __doc__)
    parser.add_argument("results", nargs="+", metavar="RESULT", help="an evaluation.json, or a directory with one")
    with ending_in_one_line():
        compare_results(parser.parse_args(arguments).results)


if __name__ == "__main__":
    main(sys.argv[1:])

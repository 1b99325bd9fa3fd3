"""Compare formulas by math-verify (extra `math`) in a process of its own.

Some formulas, such as 9^9^9^9, take computer algebra for ever or all of the memory, and nothing inside the process can
stop it. The system ends the process at its limits; the answer is wrong then, and the next one gets a new process. It
also ends with the process that started it.
"""

import json
import os
import subprocess
import sys
from threading import Lock

SECONDS = 5  # of CPU time, so that a busy machine does not change a verdict
MEMORY = 4 * 2**30


class Symbolic:
    """Compares formulas one at a time, from any thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = Lock()

    def __call__(self, answer: str, expected: str) -> bool:
        """Whether math-verify takes two formulas in LaTeX for the same; False at the limits of time and memory.

        Raises:
            ValueError: math-verify does not start.
        """
        with self._lock:
            process = self._process or self._start()
            try:
                process.stdin.write(json.dumps([answer, expected]) + "\n")
                process.stdin.flush()
                verdict = process.stdout.readline()
            except BrokenPipeError:
                verdict = ""
            if not verdict:
                self.close()
            return verdict == "True\n"

    def close(self) -> None:
        """End the process, if any."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        # -P: without it the modules beside this file would hide those of the standard library.
        command = [sys.executable, "-P", __file__, str(SECONDS)]
        pipe, env = subprocess.PIPE, os.environ | {"PYTHONHASHSEED": "0"}
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env)
        if self._process.stdout.readline() != "ready\n":
            reason = self._process.stderr.read().strip().rpartition("\n")[2]
            self.close()
            raise ValueError(f"math-verify does not start ({reason}): install it by pip install 'diffllm[math]'")
        return self._process


def _answer_lines(seconds: float) -> None:
    """Write a verdict for each pair of formulas that is read."""
    import logging
    import resource
    import signal
    from contextlib import redirect_stdout

    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # Units are removed before; a letter that looks like one is a variable.
    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    config = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=rules)]

    def is_same(answer: str, expected: str) -> bool:
        target, gold = (parse(f"${text}$", config, "no_fallback", parsing_timeout=None) for text in (answer, expected))
        # A rounding of fewer digits is another number.
        options = {"float_rounding": 30, "allow_set_relation_comp": True, "timeout_seconds": None}
        return bool(target and gold) and verify(gold, target, **options)

    print("ready", flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nobody reads the parser's complaints
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            with redirect_stdout(sys.stderr):
                verdict = is_same(*json.loads(line))
        except Exception:  # whatever a formula does to the parser
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(verdict, flush=True)


if __name__ == "__main__":
    _answer_lines(float(sys.argv[1]))

"""`python -m tests.bench.edge_open FILE`: open it and score, in a process of its own.

torch cannot be imported here: what is measured is what a device needs.
"""

import json
import sys
import time

sys.modules["torch"] = None


def peak():
    with open("/proc/self/status") as file:  # noqa: PTH123
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main():
    import ai_edge_litert.interpreter  # noqa: F401 - its seconds are not the file's

    from annotated_src.edge import EdgeRunner

    start = time.perf_counter()
    runner = EdgeRunner(sys.argv[1])
    opened = time.perf_counter() - start
    runner.read([1, 2, 3])
    first = time.perf_counter() - start
    found = {"open": opened, "first": first, "peak": peak()}
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

"""Driver that waits for nodes of Ray: `python -m tests.lab.await_nodes COUNT TIMEOUT_S`."""

import sys
import time

import ray


def main(count: int, timeout_s: float) -> str | None:
    """None once at least `count` nodes are alive; at the deadline, who was."""
    deadline_s = time.monotonic() + timeout_s
    ray.init(log_to_driver=False)
    while True:
        alive = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
        if len(alive) >= count:
            return None
        if time.monotonic() > deadline_s:
            return f"{len(alive)} of {count} nodes alive after {timeout_s:.0f} s: {alive}"
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2])))

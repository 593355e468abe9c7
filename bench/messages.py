"""How many messages a second actors pass on this machine, and what one costs: the frames' way without the compute.

    python -m bench.messages [--quick] [--check]

In a ring of 4 to 64 actors without torch each sends to the next as stages do, all at once: small messages, and ones of
an hq4 frame's size. Then the driver calls all of them and waits for every answer, as it does once a step.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

from orchestrator.environment import prepare_environment

prepare_environment(None)  # before anything imports ray

import ray  # noqa: E402

from bench.messages_actor import CONCURRENCY_GROUPS, Messenger  # noqa: E402
from bench.record import parse_arguments, save  # noqa: E402

ACTORS = (4, 16, 64)
SIZES_BYTES = {"small": 256, "hq4 frame": 135_184}
WINDOW = 4
MESSAGES, QUICK_MESSAGES = 12_000, 2_000
ROUNDS = 50
ANSWER_S = 300.0
# Of a core, where a step of four stages takes ten seconds: the driver's part of a step.
BOUNDS = {"driver_share_at_4": 0.02}
STEP_S = 10.0


def measure(num_actors: int, num_messages: int) -> dict[str, Any]:
    """Return what a ring of so many actors passes on."""
    options: dict[str, Any] = {"concurrency_groups": CONCURRENCY_GROUPS, "num_cpus": 0}
    actor_class = ray.remote(**options)(Messenger)
    ring: list[Any] = [actor_class.remote(number) for number in range(num_actors)]
    ray.get([actor.answer.remote() for actor in ring], timeout=ANSWER_S)
    each = max(WINDOW, num_messages // num_actors)
    row: dict[str, Any] = {"actors": num_actors}
    for name, size_bytes in SIZES_BYTES.items():
        # Connections are made before the clock starts.
        for count in (WINDOW, each):
            began_s = time.monotonic()
            calls = [a.send.remote(ring[(i + 1) % num_actors], count, size_bytes, WINDOW) for i, a in enumerate(ring)]
            cpu_s = sum(ray.get(calls, timeout=ANSWER_S))
        took_s = time.monotonic() - began_s
        row[name] = {
            "messages_per_s": each * num_actors / took_s,
            "mbps": each * num_actors * size_bytes * 8e-6 / took_s,
            "cpu_s_a_message": cpu_s / (each * num_actors),
        }
    round_s: list[float] = []
    cpu_began_s = time.process_time()
    for _ in range(ROUNDS):
        began_s = time.monotonic()
        ray.get([actor.answer.remote() for actor in ring], timeout=ANSWER_S)
        round_s.append(time.monotonic() - began_s)
    row["driver_round_s"] = statistics.median(round_s)
    row["driver_cpu_s_a_round"] = (time.process_time() - cpu_began_s) / ROUNDS
    for actor in ring:
        ray.kill(actor)
    return row


def row_text(row: dict[str, Any]) -> str:
    sizes = "; ".join(
        f"{name} {row[name]['messages_per_s']:,.0f}/s, {row[name]['cpu_s_a_message'] * 1e3:.2f} ms CPU each"
        for name in SIZES_BYTES
    )
    return f"{row['actors']:3} actors: {sizes}; a round of the driver {row['driver_round_s'] * 1e3:.1f} ms"


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    rows: list[dict[str, Any]] = []
    for num_actors in ACTORS:
        rows.append(measure(num_actors, QUICK_MESSAGES if arguments.quick else MESSAGES))
        print(row_text(rows[-1]), flush=True)
    ray.shutdown()
    share = rows[0]["driver_cpu_s_a_round"] / STEP_S
    path = save("messages", arguments, {"rows": rows, "driver_share_at_4": share, "bounds": BOUNDS})
    print(f"saved {path}; the driver's calls and answers of a {STEP_S:.0f} s step: {share:.5%} of a core")
    return 1 if arguments.check and share > BOUNDS["driver_share_at_4"] else 0


if __name__ == "__main__":
    sys.exit(main())

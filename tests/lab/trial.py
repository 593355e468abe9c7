"""One run of Isthmus on a lab of its own, for another process: `python -m tests.lab.trial --hosts 3 ... train WORDS`.

The hosts have equal shares of this machine's cores, and equal paths between any two. Everything that the run leaves is
in the folder that its configuration names. Exit code 77: this machine cannot hold a lab, and why is on standard error.
"""

from __future__ import annotations

import argparse
import sys

from orchestrator.environment import RAY_SETTINGS
from tests.lab.raycluster import RayCluster
from tests.lab.wanlab import Host, Path, WanLab, missing, missing_for_cpus

CANNOT = 77


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, required=True)
    parser.add_argument("--cpus", type=float, required=True, help="of each host, in cores")
    parser.add_argument("--rate-mbps", type=float, required=True, help="of each path, each way; 0: unlimited")
    parser.add_argument("--delay-ms", type=float, required=True, help="of each path, one way")
    parser.add_argument("--congestion-control", default="cubic")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="of the run itself")
    parser.add_argument("words", nargs="+", help="the verb and its configuration, as for isthmus")
    arguments = parser.parse_args()
    if lacking := missing() or missing_for_cpus():
        sys.stderr.write(f"no WAN lab here: {lacking}\n")
        return CANNOT
    hosts = [Host(cpus=arguments.cpus, congestion_control=arguments.congestion_control)] * arguments.hosts
    path = Path(rate_mbps=arguments.rate_mbps, delay_ms=arguments.delay_ms)
    # A share of a core takes its time to start Ray.
    # Regions name the hosts: the driver is on host-0.
    labels = {host: {"region": f"host-{host}"} for host in range(arguments.hosts)}
    with (
        WanLab(hosts, path) as lab,
        RayCluster(lab, labels=labels, env=RAY_SETTINGS, start_timeout_s=240.0) as cluster,
    ):
        command = ["-m", "orchestrator.cli", *arguments.words[:1], "--address", cluster.address, *arguments.words[1:]]
        done = cluster.run_driver(command, timeout_s=arguments.timeout_s)
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())

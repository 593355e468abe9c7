"""What this machine has for training: versions, device, memory, disks, network and settings, each as a finding.

Nothing here waits for anything: what may hang is tried in `orchestrator.doctor`. No secret is ever part of a finding.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from rich.filesize import decimal

from orchestrator.environment import RAY_SETTINGS, unmet_settings

if TYPE_CHECKING:
    import torch

# What runs are tested with: the nodes of a cluster must agree on them.
_PYTHON = (3, 11)
PINS = {"torch": "2.13.0", "ray": "2.60.0"}

_MIN_MEMORY_BYTES = 2 * 2**30
_MIN_DISK_BYTES = 2**30
_USUAL_SHM_BYTES = 2**30
_USUAL_CORES = 4

# Where Ray keeps its logs and sockets, and its object store.
_TMP, _SHM = Path("/tmp"), Path("/dev/shm")  # noqa: S108
_CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")
_IDLE_RESTART = Path("/proc/sys/net/ipv4/tcp_slow_start_after_idle")
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found."""

    name: str
    passed: bool
    found: str
    # Where it failed, what to do; where it passed, at most advice.
    remedy: str = ""


def versions() -> tuple[Finding, ...]:
    """Are Python, torch and Ray those that runs are tested with?"""
    passed = sys.version_info >= _PYTHON
    remedy = "" if passed else f"install Python {'.'.join(map(str, _PYTHON))} or newer, on every node alike"
    python = Finding(name="Python", passed=passed, found=platform.python_version(), remedy=remedy)
    return (python, *(_package(name) for name in PINS))


def _package(name: str) -> Finding:
    pin = PINS[name]
    found = installed(name)
    passed = found.partition("+")[0] == pin
    remedy = f"pip install {name}=={pin}, on every node alike"
    return Finding(name=name, passed=passed, found=found or "not installed", remedy="" if passed else remedy)


def installed(package: str) -> str:
    """Return the version of a package, empty where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def device() -> tuple[Finding, ...]:
    """What will torch train on?"""
    import torch

    driver = _driver_version()
    found, remedy = "CPU only", ""
    if torch.cuda.is_available():
        devices = ", ".join(_device_text(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count()))
        found = f"{devices}; driver {driver or 'unknown'}, CUDA {torch.version.cuda}"
    elif driver:
        found = f"NVIDIA driver {driver} is loaded, but torch {torch.__version__} sees no device"
        remedy = (
            f"install the CUDA build of torch {PINS['torch']}, see that CUDA_VISIBLE_DEVICES hides none, and that "
            "the driver is as new as that build's CUDA needs"
        )
    return (Finding(name="device", passed=not remedy, found=found, remedy=remedy),)


def _device_text(device: torch._C._CudaDeviceProperties) -> str:
    return f"{device.name} ({decimal(device.total_memory)})"


def _driver_version() -> str:
    """Return the version of the NVIDIA driver that is loaded, or an empty string."""
    text = _NVIDIA_DRIVER.read_text() if _NVIDIA_DRIVER.exists() else ""
    match = re.search(r"Kernel Module.*?\s([0-9]+(?:\.[0-9]+)+)\s", text)
    return match[1] if match else ""


def memory() -> tuple[Finding, ...]:
    """Is there memory to start with?"""
    import torch

    from actors.probe import free_memory_bytes

    free_bytes = free_memory_bytes(torch.device("cpu"))
    passed = free_bytes >= _MIN_MEMORY_BYTES
    remedy = f"free memory: Ray and a few node actors take {decimal(_MIN_MEMORY_BYTES)}, before any model"
    found = f"{decimal(free_bytes)} may be used"
    return (Finding(name="memory", passed=passed, found=found, remedy="" if passed else remedy),)


def disks() -> tuple[Finding, ...]:
    """Is there room where runs, Ray's files and Ray's object store go?"""
    findings = [
        _disk("disk here", Path.cwd(), "free space, or set runs_dir= to a folder on a larger disk"),
        _disk(str(_TMP), _TMP, "free space there: Ray keeps its logs and sockets in it"),
    ]
    if _SHM.is_dir():
        usage = shutil.disk_usage(_SHM)
        advice = "it is small; in a container start it with --shm-size=1g, or Ray's object store goes to /tmp"
        findings.append(
            Finding(
                name=str(_SHM),
                passed=True,
                found=f"{decimal(usage.free)} free of {decimal(usage.total)}",
                remedy="" if usage.free >= _USUAL_SHM_BYTES else advice,
            )
        )
    return tuple(findings)


def _disk(name: str, path: Path, remedy: str) -> Finding:
    usage = shutil.disk_usage(path)
    passed = usage.free >= _MIN_DISK_BYTES
    found = f"{decimal(usage.free)} free of {decimal(usage.total)} at {path}"
    return Finding(name=name, passed=passed, found=found, remedy="" if passed else remedy)


def cores() -> tuple[Finding, ...]:
    """How many cores may this process use?"""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    advice = "" if cores >= _USUAL_CORES else f"the demo's {_USUAL_CORES} node actors share them"
    return (Finding(name="cores", passed=True, found=str(cores), remedy=advice),)


def tcp() -> tuple[Finding, ...]:
    """How does TCP answer loss, and a pause?"""
    found, advice = [f"congestion control {congestion_control()}"], list[str]()
    if congestion_control() not in ("bbr", "unknown"):
        advice.append("where links lose packets set it to bbr: sysctl -w net.ipv4.tcp_congestion_control=bbr")
    if starts_slowly_after_idle():
        found.append("starts slowly after every pause")
        advice.append("on far links a frame then takes twice its time: sysctl -w net.ipv4.tcp_slow_start_after_idle=0")
    return (Finding(name="TCP", passed=True, found=", ".join(found), remedy="\n".join(advice)),)


def congestion_control() -> str:
    """Return the congestion control of this machine's TCP, such as "bbr"; "unknown" where the system does not say."""
    return _CONGESTION.read_text().strip() if _CONGESTION.exists() else "unknown"


def starts_slowly_after_idle() -> bool:
    """Return whether this machine's TCP forgets how fast a connection was when it pauses, as Linux does by default."""
    return _IDLE_RESTART.exists() and _IDLE_RESTART.read_text().strip() != "0"


def settings() -> tuple[Finding, ...]:
    """What will a Ray that is started from here run with?"""
    values = {name: os.environ.get(name, ours) for name, ours in RAY_SETTINGS.items()}
    unmet = unmet_settings(values)
    own = [f"{name}={values[name]}" for name in values if values[name] != RAY_SETTINGS[name]]
    export = "\n".join(f"export {name}={value}" for name, value in RAY_SETTINGS.items())
    where = "on every node of a cluster, before `ray start`:"
    found = f"this environment sets {', '.join(own)}" if own else "as Isthmus sets them"
    remedy = f"unset {' '.join(unmet)} here; {where}" if unmet else where
    return (Finding(name="Ray's settings", passed=not unmet, found=found, remedy=f"{remedy}\n{export}"),)


def tracking() -> tuple[Finding, ...]:
    """Will W&B be online?"""
    from orchestrator.tracking import TrackingConfig

    mode = TrackingConfig().wandb_mode(os.environ)
    found = f"{mode}: WANDB_API_KEY is set" if mode == "online" else f"{mode}: WANDB_API_KEY is not set"
    advice = "" if mode == "online" else "`wandb sync` uploads what a run folder's wandb/ holds"
    return (Finding(name="W&B", passed=True, found=found, remedy=advice),)

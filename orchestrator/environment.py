"""What Ray must run with, set before Ray is imported: its core reads these variables once, when it is loaded."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping

# Frames ride inside actor calls, and a silent link is not a dead node. Times are for thin links: under full load at
# 2 Mbit/s a keepalive shorter than 30 s failed. Every node of a cluster needs them.
RAY_SETTINGS: Mapping[str, str] = {
    "RAY_max_direct_call_object_size": "4194304",
    "RAY_task_rpc_inlined_bytes_limit": "268435456",
    "RAY_grpc_client_keepalive_time_ms": "30000",
    "RAY_grpc_client_keepalive_timeout_ms": "60000",
    "RAY_health_check_failure_threshold": "30",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
}
# Without these a frame would go through the object store, at two more round trips each.
REQUIRED_SETTINGS = ("RAY_max_direct_call_object_size", "RAY_task_rpc_inlined_bytes_limit")


def unmet_settings(values: Mapping[str, str]) -> dict[str, str]:
    """Return those of the required settings that `values` lacks or holds too low, each with what is needed."""
    return {
        name: RAY_SETTINGS[name]
        for name in REQUIRED_SETTINGS
        if not (text := values.get(name, "")).isdecimal() or int(text) < int(RAY_SETTINGS[name])
    }


def prepare_environment(address: str | None) -> None:
    """Set what Ray reads at import, where the user has not; call it before anything imports ray."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # What a step that was given up raised meanwhile is nobody's concern, and a traceback on the console.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    for key, value in RAY_SETTINGS.items():
        os.environ.setdefault(key, value)
    if address is None and "RAY_AUTH_MODE" not in os.environ:
        # A cluster of our own, that nobody else on this machine can call.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

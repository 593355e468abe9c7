"""The data plane: what runs on each node. It never imports the control plane, `orchestrator`."""

"""The control plane: it decides and holds no device tensor."""

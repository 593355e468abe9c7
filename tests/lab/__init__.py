"""A wide-area network on one machine, for tests: hosts, shaped paths between them, and Ray across them."""

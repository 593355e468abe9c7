"""One script a claim: `python -m bench.NAME` prints and saves what it measured, `--check` holds it to its bounds."""

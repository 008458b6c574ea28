"""Parts of scripts/bench.py: methods and peers against each other."""

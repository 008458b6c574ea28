"""Parts of scripts/bench_projection.py: gradients, what methods make of them, kernel times, tables and a plot."""

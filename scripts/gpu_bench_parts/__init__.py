"""Parts of scripts/gpu_bench.py; all of them run on a CPU too, so that the tests run what a card will."""

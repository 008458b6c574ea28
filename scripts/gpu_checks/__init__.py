"""Parts of scripts/gpu_check.py; every check takes a device, so that the tests run all of them on the CPU."""

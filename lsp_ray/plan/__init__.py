"""`python -m lsp_ray.plan`: what a model takes on a machine, before anything is run."""

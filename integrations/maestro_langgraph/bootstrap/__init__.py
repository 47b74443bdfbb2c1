"""The folder that `maestro run` puts on PYTHONPATH. It holds `sitecustomize` and nothing else."""

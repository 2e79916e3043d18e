"""The part that runs inside a box: standard library only, and started as `worker.main` without the rest of jaxlm."""

"""The parts of `benchmarks/reproduce.py`.

entries (what a table holds) -> records (what has been run) -> schedule (what is missing) -> execute (train it, through
the runners of workers) -> outputs (checkpoints by publish, plots by plot, pages by report). A plain folder
beside the script: it is not part of the installed library.
"""

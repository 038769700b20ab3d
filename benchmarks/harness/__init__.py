"""The parts of `benchmarks/reproduce.py`, one idea a file.

entries (what a table holds) -> records (what has been run) -> plan (what is missing) -> execute (train it, by one of
runners and processes) -> tables and render (what came out). A plain folder beside the script: it is not part of the
installed library.
"""

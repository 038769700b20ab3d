#!/usr/bin/env python3
"""From a machine with nothing but Python 3.10 or newer to tests, checks and reproduced numbers, in one command.

    python3 dev.py reproduce --table mnist --entry mnist_cnv --seeds 0    as benchmarks/reproduce.py
    python3 dev.py test                                                   every test, on up to 8 cores
    python3 dev.py test ARGUMENT ...                                      as pytest
    python3 dev.py lint                                                   ruff and pyright, of the pages' Python too
    python3 dev.py docs                                                   the site, in build/site, warnings as errors
    python3 dev.py setup                                                  only make the environment

The first command makes a virtual environment in .venv beside this file and installs both packages into it, cnvzoo and
cnvzoo-runtime, editable, with their tools, in the versions of constraints.txt, which new records are made with. Later
commands use it until a pyproject.toml or constraints.txt changes. No other environment is touched.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
CONSTRAINTS = ROOT / "constraints.txt"
STAMP = VENV / "installed.sha256"
LOCK = ROOT / ".venv.lock"
OLDEST = (3, 10)
# all tests: a worker process on each of up to 8 cores; selected tests run in one process, which starts faster
EVERY_TEST = ("-n", "auto", "--maxprocesses", "8", "--dist", "worksteal")
DATASETS = ("mnist", "fashion_mnist", "cifar10", "cifar100")


def main(argv: list[str]) -> int:
    """Run one command and return its exit status; on POSIX, test, docs and reproduce replace this process."""
    if sys.version_info < OLDEST:
        return fail(f"Python {OLDEST[0]}.{OLDEST[1]} or newer is needed, and this is {sys.version.split()[0]}")
    command, arguments = (argv[0], argv[1:]) if argv else ("", [])
    if command not in ("setup", "test", "lint", "docs", "reproduce") or (arguments and command in ("setup", "lint")):
        print(__doc__)
        return 0 if command in ("-h", "--help") else 2
    if status := prepare():
        return status
    if command == "test":
        os.chdir(ROOT)
        return become("-m", "pytest", *(arguments or EVERY_TEST))
    if command == "lint":
        return lint()
    if command == "docs":
        return become(str(ROOT / "docs" / "site" / "build.py"), *arguments)
    if command == "reproduce":
        for name in datasets_of(arguments):
            if problem := fill_dataset(name, python()):
                say(problem)
        return become(str(ROOT / "benchmarks" / "reproduce.py"), *arguments)
    say(f"ready: {python()}")
    return 0


def say(text: str) -> None:
    print(f"dev.py: {text}", flush=True)


def fail(text: str) -> int:
    print(f"dev.py: error: {text}", file=sys.stderr, flush=True)
    return 1


def python() -> str:
    """The interpreter of the environment."""
    return str(VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def fingerprint() -> str:
    """sha256 of what the environment depends on: these files, and their path, which an editable install contains."""
    files = (ROOT / "pyproject.toml", ROOT / "runtime" / "pyproject.toml", CONSTRAINTS)
    return hashlib.sha256(b"".join(path.read_bytes() for path in files) + os.fsencode(ROOT)).hexdigest()


def is_ready() -> bool:
    """Whether the environment is complete, of the current project files, and still runs."""
    return STAMP.is_file() and STAMP.read_text() == fingerprint() and runs()


def runs() -> bool:
    """Whether the environment's interpreter starts; it does not if the Python that it was made from was removed."""
    try:
        return subprocess.run([python(), "-c", ""]).returncode == 0
    except OSError:
        return False


def prepare() -> int:
    """Make the environment, unless it is ready; returns 0, or the status of the step that failed."""
    if is_ready():
        return 0
    with open(LOCK, "a") as lock:  # another command may be making it; the system releases the lock when it ends
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(lock.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        return 0 if is_ready() else make_environment()


def make_environment() -> int:
    """Make the environment; returns 0, or the status of the step that failed."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        return fail(
            "this Python cannot make virtual environments: its modules venv and ensurepip are missing. "
            "On Debian and Ubuntu, 'apt install python3-venv' installs them"
        )
    STAMP.unlink(missing_ok=True)
    say(f"making the environment {VENV}")
    clear = ["--clear"] if VENV.exists() and not runs() else []
    if status := subprocess.run([sys.executable, "-m", "venv", *clear, str(VENV)]).returncode:
        fail(f"the environment cannot be made, see above; delete {VENV} if it is in the way")
        return status
    say("installing the project with torch, torchvision, brevitas and its tools: a minute or more")
    pip = [python(), "-m", "pip", "install", "--disable-pip-version-check"]
    if not sys.stdout.isatty():
        pip.append("--quiet")  # errors are still printed, progress bars are not
    # one call for everything: torch and torchvision resolved separately may not be compatible
    project = ["--constraint", str(CONSTRAINTS), "--editable", "./runtime", "--editable", ".", "--group", "dev"]
    for step in (["--upgrade", "pip"], ["--no-compile", *project]):
        if status := subprocess.run([*pip, *step], cwd=ROOT).returncode:
            fail("the installation failed, see above; the same command tries again")
            return status
    # pip would compile on one core. Some packages have files that are templates of code and do not compile.
    packages = VENV / ("Lib" if os.name == "nt" else "lib")
    subprocess.run([python(), "-m", "compileall", "-qq", "-j", "0", str(packages)])
    part = STAMP.with_suffix(".part")
    part.write_text(fingerprint())
    part.replace(STAMP)
    say("the environment is ready")
    return 0


def become(*arguments: str) -> int:
    """Replace this process by the environment's Python, which then receives signals and sets the exit status."""
    command = [python(), *arguments]
    sys.stdout.flush()
    if os.name == "posix":
        os.execv(command[0], command)
    return subprocess.run(command).returncode


def lint() -> int:
    """Run all checks, even after one fails; returns 0 if all pass."""
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        write_snippets(Path(folder))
        checks = {
            "ruff check": ["ruff", "check"],
            "ruff format": ["ruff", "format", "--check"],
            "pyright": ["pyright", "--pythonpath", python()],
            "pyright of the pages": ["pyright", "--pythonpath", python(), folder],
        }
        for name, check in checks.items():
            say(name)
            if subprocess.run([python(), "-m", *check], cwd=ROOT).returncode:
                failed.append(name)
    return fail(f"failed: {', '.join(failed)}") if failed else 0


def write_snippets(folder: Path) -> None:
    """Write the Python blocks of each page as one file, `docs_data.py` for docs/data.md, with the page's line numbers.

    The blocks of a page run one after the other, so names that a block defines are known in those below it.
    """
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        lines: list[str] = []
        for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            lines += [""] * (text[: block.start(1)].count("\n") - len(lines))
            lines += block[1].splitlines()
        if lines:
            name = "_".join(page.relative_to(ROOT).with_suffix(".py").parts)
            (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def datasets_of(arguments: list[str]) -> list[str]:
    """The datasets of the entries that reproduce.py selects by these arguments.

    An empty list if it trains nothing, because they ask for a list, help or a dry run or are invalid. All datasets for
    the tables `extra` and `all` without entries.
    """
    if {"-h", "--help", "--list", "--dry-run"} & set(arguments):
        return []
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--table", nargs="?")
    parser.add_argument("--entry", nargs="*", action="extend")
    given = parser.parse_known_args(arguments)[0]
    if given.table not in (*DATASETS, "extra", "all"):
        return []
    if given.entry is None:
        return [name for name in DATASETS if given.table in (name, "extra", "all")]
    return [name for name in DATASETS if any(entry.startswith(f"{name}_") for entry in given.entry)]


def fill_dataset(name: str, interpreter: str) -> str | None:
    """Fill the cache of a dataset from a folder shared/datasets beside the checkout, which needs no download.

    Returns None if the dataset is in the cache now, else a line that says why not. The library downloads a missing
    dataset if there is a network.
    """
    root = Path(os.environ.get("CNVZOO_DATA") or Path.home() / ".cache" / "cnvzoo" / "datasets").expanduser()
    if (root / f"{name}.safetensors").is_file():
        return None
    script = ROOT.parent / "shared" / "datasets" / "datasets.py"
    missing = f"{name} is not in the dataset cache {root}"
    if not script.is_file():
        return f"{missing}: cnvzoo.load_dataset({name!r}) downloads it where there is a network"
    say(f"{missing}: taking it from {script.parent}")
    done = subprocess.run([interpreter, str(script), "get", name, "--root", str(root)])
    return f"{missing}, and {script} get {name} failed" if done.returncode else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m cnvzoo`: the command line."""

from cnvzoo.cli import main

if __name__ == "__main__":
    main()

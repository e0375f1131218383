"""``python -m lightning_efficient``: the command line where the console script is not on the path."""

from lightning_efficient.cli import main

if __name__ == "__main__":
    main()

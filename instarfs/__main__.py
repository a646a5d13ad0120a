"""`python -m instarfs`."""

from instarfs.cli.main import main

if __name__ == "__main__":
    main()

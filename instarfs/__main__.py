"""`python -m instarfs`."""

from instarfs.cli.start import main

if __name__ == "__main__":
    main()

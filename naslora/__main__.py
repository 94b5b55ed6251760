"""Runs the command line: python -m naslora, also under torchrun."""

from naslora.cli import main

if __name__ == "__main__":
    main()

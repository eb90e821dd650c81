"""``python -m dyncomp``."""

from dyncomp.cli import main

if __name__ == "__main__":
    main()

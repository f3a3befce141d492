"""`python -m melfold`: the command line."""

from melfold.cli.main import main

if __name__ == "__main__":
    main()

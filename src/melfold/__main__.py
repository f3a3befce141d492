"""`python -m melfold` and the console script: the command line."""

import sys


def main() -> None:
    """Run a command. Ctrl-C while its modules are still being loaded is no reason for a traceback."""
    try:
        from melfold.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("melfold: stopped.\n")
        sys.exit(130)


if __name__ == "__main__":
    main()

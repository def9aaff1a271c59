"""`python -m cce_inductor doctor`."""

import argparse
import sys

from . import doctor


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m cce_inductor")
    commands = parser.add_subparsers(dest="command", required=True)
    checks = commands.add_parser(
        "doctor", help="check this installation", description="Says what is installed and compiles a small loss."
    )
    checks.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    return doctor.main(parser.parse_args().device)


if __name__ == "__main__":
    sys.exit(main())

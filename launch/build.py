"""Compile what Stepladder compiles for this machine, ahead of its first use: `python -m launch.build`.

Without it the first deployment does so. An image of a container is a good place: a start then compiles nothing.
"""

import argparse
import logging
import sys

from stepladder.kernels.cpu import build


def main() -> None:
    argparse.ArgumentParser(prog="stepladder build", description=__doc__.splitlines()[0]).parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        print(f"native CPU kernels: {build.build()}")
    except build.Unavailable as error:
        sys.exit(f"stepladder: {error}")


if __name__ == "__main__":
    main()

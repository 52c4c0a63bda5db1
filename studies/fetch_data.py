"""Fetch data sets beforehand: ``python studies/fetch_data.py cifar10 fashion_mnist``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from image_data.cifar10 import load_cifar10
from image_data.fashion_mnist import load_fashion_mnist
from image_data.images import FOLDER, Images

LOADERS: Mapping[str, Callable[[], tuple[Images, Images]]] = {
    "cifar10": load_cifar10,
    "fashion_mnist": load_fashion_mnist,
}


def main() -> None:
    """Fetch what is named and say what it is."""
    parser = argparse.ArgumentParser(description=f"Fetch data sets into {FOLDER}, once, and verify them.")
    parser.add_argument("names", metavar="NAME", nargs="+", choices=list(LOADERS), help=", ".join(LOADERS))
    for name in parser.parse_args().names:
        train, test = LOADERS[name]()
        print(f"{name}: {len(train.labels)} training and {len(test.labels)} test images in {FOLDER}.")


if __name__ == "__main__":
    main()

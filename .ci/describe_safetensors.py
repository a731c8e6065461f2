"""Describes a SafeTensors file as Python's safetensors package reads it.

    describe_safetensors.py FILE

Prints a JSON object: tensor name -> {"dtype", "shape", "sha256"}. The hash is that of the tensor's
elements in row-major order, little-endian.
"""

import hashlib
import json
import sys

from safetensors import deserialize


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with open(sys.argv[1], "rb") as file:
        tensors = deserialize(file.read())
    description = {
        name: {
            "dtype": tensor["dtype"],
            "shape": tensor["shape"],
            "sha256": hashlib.sha256(tensor["data"]).hexdigest(),
        }
        for name, tensor in tensors
    }
    json.dump(description, sys.stdout, indent=1, sort_keys=True)
    print()


main()

"""One timed load by a Python package, as a process of its own: what `cargo xtask bench --peers` runs.

    python load.py PACKAGE FILE...    loads the files into CPU memory and prints one JSON object
    python load.py versions           prints the version of each package, or why it cannot be used

Neither the start of the interpreter nor imports are timed. As in every other case of the bench,
`elapsed_seconds` ends when every tensor can be used, `touched_seconds` after each of their bytes was read once
more, and `xor` is the exclusive or of all bytes. With STREAM=1 in the environment nothing is kept, nor read once
more: the time ends when the last tensor was handed out.
"""

import importlib.metadata
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

PIECE_BYTES = 4 << 20


def safetensors():
    from safetensors.torch import load_file

    def load(paths):
        tensors = []
        for path in paths:
            tensors.extend(load_file(path, device="cpu").values())
        return tensors

    return load


def runai_model_streamer():
    from runai_model_streamer import SafetensorsStreamer

    def load(paths):
        # The streamer's threads and buffers are the package's defaults; the tensors that it hands out
        # are the caller's to keep.
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(paths, device="cpu")
            return [tensor for _, tensor in streamer.get_tensors()]

    return load


def fastsafetensors():
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    def load(paths):
        # Without GPUDirect Storage, which has no business in CPU memory. The buffer has to outlive the
        # tensors, so it is kept until the process ends.
        loader = SafeTensorsFileLoader(SingleGroup(), device="cpu", nogds=True)
        loader.add_filenames({0: paths})
        buffer = loader.copy_files_to_device()
        load.kept = (loader, buffer)
        return [buffer.get_tensor(name) for name in loader.get_keys()]

    return load


def runai_model_streamer_stream(paths):
    from runai_model_streamer import SafetensorsStreamer

    total = 0
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(paths, device="cpu")
        for _, tensor in streamer.get_tensors():
            total += tensor.numel() * tensor.element_size()
    return total


PACKAGES = {
    "safetensors": safetensors,
    "runai-model-streamer": runai_model_streamer,
    "fastsafetensors": fastsafetensors,
}


def peak_resident_bytes():
    # Not `getrusage`: its maximum begins with what the parent held when it started this process.
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def xor_of(tensors):
    import numpy
    import torch

    pieces = []
    for tensor in tensors:
        flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        pieces.extend(flat[at : at + PIECE_BYTES] for at in range(0, flat.size, PIECE_BYTES))

    def fold(piece):
        whole = piece.size // 8 * 8
        words = numpy.bitwise_xor.reduce(piece[:whole].view(numpy.uint64)) if whole else 0
        result = 0
        for byte in int(words).to_bytes(8, "little") + piece[whole:].tobytes():
            result ^= byte
        return result

    result = 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        for folded in threads.map(fold, pieces):
            result ^= folded
    return result


def main():
    name, *paths = sys.argv[1:]
    if name == "versions":
        found = {}
        for package, prepare in PACKAGES.items():
            try:
                prepare()
                found[package] = {"version": importlib.metadata.version(package)}
            except Exception as error:
                found[package] = {"reason": f"{type(error).__name__}: {error}"}
        print(json.dumps(found))
        return

    import numpy
    import torch  # noqa: F401

    load = PACKAGES[name]()
    # Touched and given back, as every other case does it before its clock starts.
    primed = numpy.empty(int(os.environ.get("PRIME_BYTES", "0")), dtype=numpy.uint8)
    primed.fill(1)
    del primed
    begun = time.perf_counter()
    if os.environ.get("STREAM"):
        if name != "runai-model-streamer":
            sys.exit(f"{name} does not stream")
        total = runai_model_streamer_stream(paths)
        elapsed = time.perf_counter() - begun
        printed = {
            "elapsed_seconds": elapsed,
            "touched_seconds": None,
            "data_bytes": total,
            "peak_resident_bytes": peak_resident_bytes(),
            "xor": None,
            "choice": None,
        }
        print(json.dumps(printed), flush=True)
        os._exit(0)
    tensors = load(paths)
    elapsed = time.perf_counter() - begun
    xor = xor_of(tensors)
    touched = time.perf_counter() - begun
    print(
        json.dumps(
            {
                "elapsed_seconds": elapsed,
                "touched_seconds": touched,
                "data_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
                "peak_resident_bytes": peak_resident_bytes(),
                "xor": xor,
                "choice": None,
            }
        ),
        flush=True,
    )
    # Nothing that packages do on their way out belongs to the measurement or may spoil it.
    os._exit(0)


if __name__ == "__main__":
    main()

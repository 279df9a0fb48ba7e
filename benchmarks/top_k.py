"""The K-th largest magnitude: bisection on the bit pattern against `jax.lax.top_k` and a sort.

    python benchmarks/top_k.py                      # 1 M, 4 M and 16 M values
    python benchmarks/top_k.py --millions 1 64      # other sizes
    python benchmarks/top_k.py --sparsity 0.99
    python benchmarks/top_k.py --output docs/results/top_k_cpu.json

Prints one table: milliseconds, the median of several runs, each function compiled by itself, on the
default JAX device. All three find the same threshold, which is checked. The values are normal, as
activations before a ReLU are.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from swat_jax.sparsity import top_k

Method = Callable[[jax.Array, int], jax.Array]


def bisection(x: jax.Array, keep: int) -> jax.Array:
    return top_k.threshold(x, keep)


def lax_top_k(x: jax.Array, keep: int) -> jax.Array:
    return jax.lax.top_k(jnp.abs(x), keep)[0][-1]


def sort(x: jax.Array, keep: int) -> jax.Array:
    return jnp.sort(jnp.abs(x))[x.size - keep]


METHODS: dict[str, Method] = {"threshold": bisection, "lax.top_k": lax_top_k, "jnp.sort": sort}


def median_milliseconds(method: Method, x: jax.Array, keep: int, seconds: float) -> tuple:
    """Median time of at least three runs that fill `seconds`, and the result."""
    compiled = jax.jit(method, static_argnums=1)
    result = compiled(x, keep).block_until_ready()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        compiled(x, keep).block_until_ready()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times), float(result)


def processor() -> str:
    """The CPU's name as Linux has it, or what Python knows of the machine."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the exact K-th largest magnitude.")
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 4, 16], metavar="N")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement, at least")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", help="JSON file to write")
    arguments = parser.parse_args()

    device = jax.devices()[0]
    print(f"JAX {jax.__version__}, {device.device_kind} ({platform.machine()}), ", end="")
    print(f"sparsity {arguments.sparsity}, milliseconds")
    header = f"{'values':>10} {'type':>9}" + "".join(f"{name:>12}" for name in arguments.methods)
    print(header)
    print("-" * len(header))
    load, rows = os.getloadavg()[0], []
    for millions in arguments.millions:
        size = millions * 10**6
        keep = top_k.keep_count(arguments.sparsity, size)
        for dtype in (jnp.float32, jnp.bfloat16):
            x = jax.random.normal(jax.random.key(0), (size,), dtype).block_until_ready()
            times, found = {}, set()
            for name in arguments.methods:
                milliseconds, result = median_milliseconds(
                    METHODS[name], x, keep, arguments.seconds
                )
                times[name] = milliseconds
                found.add(result)
            if len(found) != 1:
                raise SystemExit(f"the methods disagree: {found}")
            row = "".join(f"{milliseconds:12.1f}" for milliseconds in times.values())
            print(f"{size:>10} {jnp.dtype(dtype).name:>9}{row}", flush=True)
            rows.append({"values": size, "type": jnp.dtype(dtype).name, "milliseconds": times})
    if arguments.output:
        report = {
            "date": datetime.date.today().isoformat(),
            "device": device.device_kind,
            "cpu": f"{processor()}, {os.cpu_count()} cores",
            "load_average_before": round(load, 2),
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
            "sparsity": arguments.sparsity,
            "rows": rows,
        }
        path = pathlib.Path(arguments.output)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

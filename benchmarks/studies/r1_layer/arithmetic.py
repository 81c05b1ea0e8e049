"""What `--workers ray` takes for DeepSeek-R1's 671 billion weights on N machines, from counted work and measured rates: a table.

    python benchmarks/studies/r1_layer/arithmetic.py [--machines 1,2,4,…] [--cores 16] [--windows 128] [--length 512] …

Every rate is an option; the defaults are those that docs/r1_on_machines.md states. Work is counted from the shapes of
scripts/r1_headers.py, as quantize/tasks.py cuts it: a slab of rows of a matrix is a task, an expert is a task. A block is

    head       the machine that leads: forward passes, second moments and factors of attention, what experts add, the block's file
    tasks      experts and slabs of rows, on all machines; a stage waits for its last task
    transfer   bytes over each machine's network: weights in, codes out, rows of experts, factors

and these three are added: nothing is assumed to overlap.
"""

import argparse
import math
import runpy
from dataclasses import dataclass
from pathlib import Path

HEADERS = runpy.run_path(str(Path(__file__).parents[3] / "scripts" / "r1_headers.py"))
HIDDEN, EXPERTS, LAYERS, DENSE = (HEADERS[name] for name in ("HIDDEN", "EXPERTS", "LAYERS", "DENSE"))
USED, INNER, DENSE_INNER, MIXED, LATENT = 8, 2048, 18432, 128 * 128, 512
SLAB = 1 << 24  # weights of a task (quantize/engine.py)
EXPERT = 3 * INNER * HIDDEN  # weights of an expert


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one core does in a second: multiply-adds (bfloat16 or float32 forward, float32 in factors), weights coded and read."""

    products: float
    exact_products: float
    coded: float
    read: float


@dataclass(frozen=True, kw_only=True)
class Machine:
    """`cores` of such rates; bytes a second of its network and of the shared disk; its price an hour."""

    cores: int
    network: float
    disk: float
    price: float


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A group of matrices that read one input: `rows` in all, `columns`, and the multiply-adds to make their input, a token."""

    name: str
    rows: int
    columns: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


ATTENTION = (
    Matrix(name="q_a, kv_a", rows=1536 + 576, columns=HIDDEN),
    Matrix(name="q_b", rows=128 * 192, columns=1536),
    Matrix(name="k_b, v_b", rows=128 * 256, columns=LATENT),
    Matrix(name="o", rows=HIDDEN, columns=MIXED),
)
SHARED = (Matrix(name="gate, up", rows=2 * INNER, columns=HIDDEN), Matrix(name="down", rows=HIDDEN, columns=INNER))
FEED_FORWARD = (
    Matrix(name="gate, up", rows=2 * DENSE_INNER, columns=HIDDEN),
    Matrix(name="down", rows=HIDDEN, columns=DENSE_INNER),
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """Of one block. Seconds of one core: of the head, all tasks, the longest task. Bytes: to every machine, and to any of them."""

    head: float
    tasks: float
    longest: float
    count: int
    to_each: float
    shared_out: float
    disk: float
    weights: int


def factor(columns: int) -> float:
    """Return the multiply-adds of a product that takes as long as a factorisation: it runs at half the pace."""
    return columns**3 / 3


def feedback(weights: int, columns: int) -> float:
    """Return the multiply-adds of error feedback into later columns."""
    return weights * columns / 2


def stage(matrix: Matrix, tokens: float, rates: Rates) -> tuple[float, float, int]:
    """Return seconds of the head (statistics, factor, the forward pass of what was coded), of all tasks together, and their number."""
    head = (
        tokens * (0.6 * matrix.columns**2 + matrix.weights) / rates.products
        + factor(matrix.columns) / rates.exact_products
    )
    head += matrix.weights / rates.read
    tasks = feedback(matrix.weights, matrix.columns) / rates.exact_products
    tasks += matrix.weights / rates.coded + matrix.weights / rates.read
    return head, tasks, math.ceil(matrix.weights / SLAB)


def block(sparse: bool, tokens: int, length: int, rates: Rates, bits: float, number: int) -> Work:
    """Return the work of a block; `number` bytes for a number of the rows that experts read, `bits` a weight that is written."""
    stages = ATTENTION + (SHARED if sparse else FEED_FORWARD)
    found = [stage(matrix, tokens, rates) for matrix in stages]
    head, tasks, count = (sum(column) for column in zip(*found, strict=True))
    head += tokens * length * 128 * (192 + 128) / 2 / rates.products  # attention scores and mixtures, the causal half
    longest = max(seconds / number_of for _, seconds, number_of in found)
    weights = sum(matrix.weights for matrix in stages)
    to_each = 4.0 * sum(matrix.columns**2 for matrix in stages)  # the factors, to every machine
    shared_out = 0.0
    if sparse:
        own = tokens * USED / EXPERTS
        one = own * (0.6 * (HIDDEN**2 + INNER**2) + EXPERT * 2 / 3) / rates.products
        one += (
            factor(HIDDEN) + factor(INNER) + feedback(EXPERT * 2 // 3, HIDDEN) + feedback(EXPERT // 3, INNER)
        ) / rates.exact_products
        one += EXPERT / rates.coded + 2 * EXPERT / rates.read
        head += tokens * USED * EXPERT / rates.products + EXPERTS * EXPERT / rates.read  # what experts add, coded
        tasks, longest, count = tasks + EXPERTS * one, max(longest, one), count + EXPERTS
        weights += EXPERTS * EXPERT
        shared_out = tokens * USED * HIDDEN * number
    # Weights are read in 8 bits, parts are written and read by the machine that leads, the block's file is written.
    disk = weights * (1 + 3 * bits / 8)
    return Work(
        head=head,
        tasks=tasks,
        longest=longest,
        count=count,
        to_each=to_each,
        shared_out=shared_out,
        disk=disk,
        weights=weights,
    )


def line(count: int, blocks: list[Work], machine: Machine) -> str:
    """Return a row of the table for `count` machines."""
    head = sum(work.head for work in blocks) / machine.cores
    # A task is done by one core-group of a machine: no machine waits for more than its share and one task.
    tasks = sum(max(work.tasks / count, work.longest) for work in blocks) / machine.cores
    moved = sum(work.to_each * (count - 1) + work.shared_out * (count - 1) / count for work in blocks)
    sent = moved / machine.network if count > 1 else 0.0  # all of it leaves the head's machine
    stored = sum(work.disk for work in blocks) / machine.disk
    parts = {"tasks": tasks, "head": head, "head's network": sent, "shared disk": stored}
    total = sum(parts.values())
    bottleneck = max(parts, key=lambda name: parts[name])
    cells = [f"{seconds / 3600:.1f}" for seconds in parts.values()]
    cost = count * total / 3600 * machine.price
    return f"| {count} | {' | '.join(cells)} | {total / 3600:.1f} | {moved / 1e9:,.0f} | {cost:,.0f} | {bottleneck} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Hours, bytes and cost of DeepSeek-R1 on N machines.")
    parser.add_argument("--machines", default="1,2,4,8,16,32")
    parser.add_argument("--cores", type=int, default=16)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--products", type=float, default=95e9, help="multiply-adds a second and core, forward passes")
    parser.add_argument("--exact-products", type=float, default=38e9, help="the same in float32, factors and feedback")
    parser.add_argument("--coded", type=float, default=5e6, help="weights coded a second and core")
    parser.add_argument(
        "--read", type=float, default=180e6, help="weights a second and core, for each time they are read or written"
    )
    parser.add_argument("--network", type=float, default=1.25e9, help="bytes a second of a machine's network")
    parser.add_argument("--disk", type=float, default=1e9, help="bytes a second of the shared disk")
    parser.add_argument("--price", type=float, default=0.8, help="of a machine, an hour")
    parser.add_argument("--bits", type=float, default=4.58, help="a weight, of what is written")
    asked = parser.parse_args()
    rates = Rates(products=asked.products, exact_products=asked.exact_products, coded=asked.coded, read=asked.read)
    machine = Machine(cores=asked.cores, network=asked.network, disk=asked.disk, price=asked.price)
    tokens = asked.windows * asked.length
    blocks = [block(layer >= DENSE, tokens, asked.length, rates, asked.bits, number=2) for layer in range(LAYERS)]
    print(
        f"{sum(work.count for work in blocks):,} tasks; {sum(work.disk for work in blocks) / 1e9:,.0f} GB through the shared disk"
    )
    print("| machines | tasks, h | head, h | network, h | disk, h | together, h | moved, GB | cost | bottleneck |")
    print("|" + "--|" * 9)
    for count in map(int, asked.machines.split(",")):
        print(line(count, blocks, machine))


if __name__ == "__main__":
    main()

"""TRAIN TINY-R1: teach the embedded model of five million parameters to reason about sums the way R1 does.

The checkpoint this leaves behind is an ordinary Hugging Face folder with its card. Runs on two cores; stop it at any
time and run it again, it goes on where its last state was saved.
"""

import argparse
import logging
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from r1q.models.tiny_r1_card import Facts, render, score_table
from r1q.models.tiny_r1_files import CONFIG, build_tokenizer, write_files
from r1q.models.tiny_r1_model import TOKEN_LIMIT, TinyR1, encode, load_weights, round_weights, save_weights, scores
from r1q.models.tiny_r1_tasks import EOS, LEVELS, draw, sample

log = logging.getLogger("train_tiny")

TOKENS = 6_800_000
STATE = "state.pt"
EVALUATION_BYTES = 90_000
CRUDE = ((4, 32), (3, 32), (2, 32), (4, 128), (3, 128), (2, 128))
"""(bits, group_size) of the crude roundings in the card."""
PROMPT_WEIGHT = 0.1
"""Weight of the question's tokens in the loss: enough that a perplexity over whole texts means something."""

WRITTEN = ("sum", "product", "chain", "story")
CURRICULUM = (
    (0, (*WRITTEN, "long")),
    (3_680_000, (*WRITTEN, *3 * ("long",))),
    (4_750_000, (*WRITTEN, *3 * ("mental",))),
)
"""What is drawn from how many tokens on: first the written methods and a hard start in the head, then more of the head."""


@dataclass(frozen=True)
class Plan:
    """How long, how fast and how often."""

    tokens: int
    batch_tokens: int
    lr: float
    seed: int

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.tokens // self.batch_tokens

    def lr_at(self, step: int) -> float:
        """Warm up, hold, and fall in a straight line to a twentieth over the last three tenths."""
        left = (self.steps - step) / (0.3 * self.steps)
        return self.lr * min(1.0, (step + 1) / 100, max(0.05, left))

    def row_length(self, step: int) -> int:
        """Short rows, which are cheap; full context at the end, so that later positions are known too."""
        return 256 if step < 0.9 * self.steps else int(CONFIG["max_position_embeddings"])

    def levels(self, step: int) -> tuple[str, ...]:
        """The levels to draw from, each as often as it is named."""
        return next(levels for tokens, levels in reversed(CURRICULUM) if step * self.batch_tokens >= tokens)


def make_batch(tokenizer: Tokenizer, plan: Plan, step: int) -> tuple[Tensor, Tensor]:
    """Training problems one after the other: tokens and loss weights, both [rows, length + 1]."""
    # All hangs on seed and step, so a resumed run sees what an unbroken one would have seen.
    rng = random.Random(f"{plan.seed}:{step}")
    length, levels = plan.row_length(step), plan.levels(step)
    tokens, weights = [], []
    for _ in range(plan.batch_tokens // length):
        ids: list[int] = []
        weight: list[float] = []
        while len(ids) <= length:
            prompt, completion = encode(tokenizer, draw(rng, rng.choice(levels), held_out=False))
            ids += prompt + completion
            # The first token, BOS, follows whatever stood before and teaches nothing.
            weight += [0.0] + [PROMPT_WEIGHT] * (len(prompt) - 1) + [1.0] * len(completion)
        tokens.append(ids[: length + 1])
        weights.append(weight[: length + 1])
    return torch.tensor(tokens), torch.tensor(weights)


def make_optimizers(model: TinyR1, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, as the token budget is small; AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if not (p.dim() == 2 and "layers" in name)]
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [adam, torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]


def train_step(
    model: TinyR1, optimizers: list[torch.optim.Optimizer], batch: tuple[Tensor, Tensor], lr: float
) -> float:
    """One step on one batch; returns the weighted mean loss in nats per token."""
    tokens, weights = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, _ = model(tokens[:, :-1])
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    target = weights[:, 1:].flatten()
    loss = (losses * target).sum() / target.sum()
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def save_state(path: Path, model: TinyR1, optimizers: list[torch.optim.Optimizer], step: int, seconds: float) -> None:
    """Write the whole state beside its final name, then rename: a crash leaves the last good state."""
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
        "seconds": seconds,
        "rng": torch.get_rng_state(),
    }
    fresh = path.with_suffix(".new")
    torch.save(state, fresh)
    fresh.replace(path)


def load_state(path: Path, model: TinyR1, optimizers: list[torch.optim.Optimizer]) -> tuple[int, float]:
    """Take up the saved state, if there is one; returns the step to do next and the seconds spent so far."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    # Without optimizers the caller only wants the weights.
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=bool(optimizers)):
        optimizer.load_state_dict(saved)
    torch.set_rng_state(state["rng"])
    return state["step"], state["seconds"]


def train(plan: Plan, tokenizer: Tokenizer, path: Path, every: float) -> None:
    """Train from the saved state, or from scratch, to the end of the plan."""
    torch.manual_seed(plan.seed)
    model = TinyR1()
    optimizers = make_optimizers(model, plan.lr)
    step, seconds = load_state(path, model, optimizers)
    log.info("%d parameters, step %d of %d", sum(p.numel() for p in model.parameters()), step, plan.steps)
    began = saved = shown = time.monotonic()
    while step < plan.steps:
        batch = make_batch(tokenizer, plan, step)
        loss = train_step(model, optimizers, batch, plan.lr_at(step))
        step += 1
        now = time.monotonic()
        if now - shown > 20:
            total = seconds + now - began
            log.info("step %d, %.1fM tokens, %.0f s, loss %.4f", step, step * plan.batch_tokens / 1e6, total, loss)
            shown = now
        if now - saved > every or step == plan.steps:
            save_state(path, model, optimizers, step, seconds + now - began)
            saved = now
            quick = scores(model, tokenizer, sample("quick", 100, held_out=True))
            log.info("held out: %s", "  ".join(f"{level} {value:.0f}" for level, value in quick.items()))


def fixed_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer beside the state, learned on the first run."""
    if not path.exists():
        problems = sample("vocabulary", 4000, held_out=False, levels=CURRICULUM[0][1])
        texts = [f"{problem.question}\n{problem.trace}\n\n" for problem in problems]
        build_tokenizer(texts).save(str(path))
    return Tokenizer.from_file(str(path))


def write_model(state: Path, out: Path, tokenizer: Tokenizer) -> TinyR1:
    """Write the state's weights and every file beside them but the card; returns the model as it was stored."""
    model = TinyR1()
    load_state(state, model, [])
    write_files(out, tokenizer)
    save_weights(model, out)
    (out / "evaluation.txt").write_text(evaluation_text(EVALUATION_BYTES), encoding="utf-8")
    return load_weights(out)


def evaluation_text(size: int) -> str:
    """Held-out problems with their traces, one after the other, up to about size bytes."""
    text = "".join(problem.prompt + problem.completion for problem in sample("evaluation", 1000, held_out=True))
    cut = text.encode()[:size].decode(errors="ignore")
    return cut[: cut.rindex(EOS) + len(EOS)]


def write_card(model: TinyR1, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Measure the stored model and its crude roundings, and write what came out into the card."""
    problems = sample("score", args.per_level * len(LEVELS), held_out=True)
    columns = {"bf16": scores(model, tokenizer, problems)}
    for bits, group_size in CRUDE:
        columns[f"{bits} bit g{group_size}"] = scores(round_weights(model, bits, group_size), tokenizer, problems)
    _, seconds = load_state(args.state / STATE, TinyR1(), [])
    facts = Facts(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens=args.tokens,
        seconds=seconds,
        seed=args.seed,
        machine=args.machine,
        command=f"python -m r1q.models.train_tiny --tokens {args.tokens} --lr {args.lr} --seed {args.seed}",
        per_level=args.per_level,
        limit=TOKEN_LIMIT,
    )
    (args.out / "README.md").write_text(render(facts, columns), encoding="utf-8")
    log.info("scores\n%s", score_table(columns))


def build_argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m r1q.models.train_tiny",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="About an hour on two cores with bf16 instructions. Watch the log: the loss falls below 0.2 within "
        "1.5 million tokens, and every few minutes 100 held-out problems are tried. Look at --out before you commit it.",
    )
    parser.add_argument("--state", type=Path, default=Path("tiny_train"), help="folder of the state to go on from")
    parser.add_argument("--out", type=Path, default=Path("tiny_r1"), help="folder to write the finished model into")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens to train on in all")
    parser.add_argument("--batch-tokens", type=int, default=6144, help="tokens per step; a multiple of 1024")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=1, help="of the first weights and of the problems")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument("--save-every", type=float, default=240, help="seconds between saved states")
    parser.add_argument("--per-level", type=int, default=200, help="held-out problems per level for the card")
    parser.add_argument("--machine", default="two CPU cores", help="what to call this machine in the card")
    parser.add_argument(
        "--snapshot", action="store_true", help="write the model as it stands now, without card; no training"
    )
    return parser


def main() -> None:
    """Train, write, measure."""
    args = build_argument_parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    args.state.mkdir(parents=True, exist_ok=True)
    tokenizer = fixed_tokenizer(args.state / "tokenizer.json")
    if not args.snapshot:
        train(Plan(args.tokens, args.batch_tokens, args.lr, args.seed), tokenizer, args.state / STATE, args.save_every)
    model = write_model(args.state / STATE, args.out, tokenizer)
    if not args.snapshot:
        write_card(model, tokenizer, args)


if __name__ == "__main__":
    main()

"""Trains a small GPT with hand-written attention twice, with stock torch.compile and with fa3_inductor, side by side.

Run: python examples/quickstart.py [--steps N] [--other-seeds N]

The attention is written the way nanoGPT writes it: a causal mask kept as a buffer, masked_fill with -inf, softmax.
The text is 30 of Shakespeare's sonnets (sonnets.txt beside this file; in the public domain). Without a GPU everything
runs in float32 on the CPU; with one, in bfloat16 and with a larger model. Each run has a process of its own, so that
the peaks of memory can be compared.
"""

import argparse
import math
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

TEXT = Path(__file__).with_name("sonnets.txt")
ON_CPU = dict(layers=2, heads=4, width=128, context=256, batch=8, steps=40)
ON_GPU = dict(layers=8, heads=12, width=768, context=1024, batch=16, steps=200)


class CausalSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, context: int):
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.attn_dropout = nn.Dropout(0.0)
        self.register_buffer("bias", torch.tril(torch.ones(context, context)).view(1, 1, context, context))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        k = k.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        v = v.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = F.softmax(att, dim=-1)
        att = self.attn_dropout(att)
        y = att @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, context: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, heads, context)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, symbols: int, layers: int, heads: int, width: int, context: int):
        super().__init__()
        self.wte = nn.Embedding(symbols, width)
        self.wpe = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, context) for _ in range(layers)))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.size(1), device=tokens.device))
        logits = self.head(self.ln_f(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class PeakMemory:
    """Peak of memory since :meth:`restart`: what torch holds on the GPU, else what this process holds (Linux only)."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def restart(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> float:
        """In MiB."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 2**20
        if sys.platform != "linux":
            return math.nan
        (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10


def train(backend: str, steps: int | None, seed: int) -> dict:
    """One run: the seed says what weights it starts from and what batches it sees."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = dict(ON_GPU if device == "cuda" else ON_CPU)
    batch, default_steps = size.pop("batch"), size.pop("steps")
    text = TEXT.read_text()
    symbols = sorted(set(text))
    data = torch.tensor([symbols.index(ch) for ch in text])

    torch.manual_seed(seed)
    model = GPT(len(symbols), **size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    compiled = torch.compile(model, backend=backend)
    memory = PeakMemory(device)
    losses, seconds = [], []
    for step in range(steps or default_steps):
        if step == 3:  # compiled and warm
            memory.restart()
        start = time.perf_counter()
        at = torch.randint(len(data) - size["context"] - 1, (batch,))
        tokens = torch.stack([data[i : i + size["context"]] for i in at]).to(device)
        targets = torch.stack([data[i + 1 : i + size["context"] + 1] for i in at]).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = compiled(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)

    import fa3_inductor

    return {
        "losses": losses,
        "milliseconds": 1000 * statistics.median(seconds[3:]),
        "memory": memory.read(),
        "report": fa3_inductor.reports(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="training steps, more than 3 (default: 40 on a CPU, 200 on a GPU)")
    parser.add_argument("--other-seeds", type=int, default=0, help="train without the pass from as many more seeds")
    options = parser.parse_args()
    steps = options.steps
    if steps is not None and steps <= 3:
        parser.error("--steps has to be more than 3: the first three warm up")

    def run(backend: str, seed: int = 1337) -> dict:
        print(f"training with torch.compile(model, backend={backend!r}) from seed {seed} ...", flush=True)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
            return child.submit(train, backend, steps, seed).result()

    stock, fused = run("inductor"), run("fa3_inductor")
    others = [run("inductor", seed) for seed in range(1, options.other_seeds + 1)]

    print("\nWhat fa3_inductor did:\n")
    print(fused["report"])
    print(f"\n{'':>24}{'inductor':>14}{'fa3_inductor':>14}")
    shown = range(0, len(stock["losses"]), max(1, len(stock["losses"]) // 6))
    for step in [*shown, len(stock["losses"]) - 1]:
        print(f"{f'loss, step {step}':>24}{stock['losses'][step]:>14.5f}{fused['losses'][step]:>14.5f}")
    for name, key in (("time per step, ms", "milliseconds"), ("peak memory, MiB", "memory")):
        print(f"{name:>24}{stock[key]:>14.1f}{fused[key]:>14.1f}")

    if others:
        late = -(-len(stock["losses"]) // 10)
        means = [statistics.mean(result["losses"][-late:]) for result in (stock, fused, *others)]
        print(
            f"\nmean loss of the last {late} steps: {means[0]:.4f}, with the pass {means[1]:.4f}, and from other seeds"
        )
        print(f"without it {', '.join(f'{mean:.4f}' for mean in means[2:])}")

    if not fused["report"].fused:
        raise SystemExit("no attention was fused: the report above says why")
    apart = max(abs(a - b) for a, b in zip(stock["losses"], fused["losses"], strict=True))
    print(f"\nlargest difference between the two losses: {apart:.1e}")
    if not apart < 0.05:
        raise SystemExit("the two runs should agree to rounding, and do not")


if __name__ == "__main__":
    main()

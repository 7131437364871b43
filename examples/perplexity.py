"""Trains the small GPT of quickstart.py, and evaluates it with its attention in 16 bits and in FP8.

Run: python examples/perplexity.py [--steps N]

The last tenth of the text is held out. Training and evaluation are in bfloat16 (by autocast). In FP8, each attention
rounds its queries, keys and values to e4m3: `fp8="quantize"`. Without a Hopper GPU, plain PyTorch computes what the FP8
kernel would, its rounding included.
"""

import argparse
import math

import torch
from quickstart import GPT, ON_CPU, ON_GPU, TEXT

import fa3_inductor

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICE, SIZE = ("cuda", ON_GPU) if ON_HOPPER else ("cpu", ON_CPU)
TARGET = "hopper" if ON_HOPPER else "reference"
SETTINGS = {
    "bfloat16": dict(fp8="off"),
    "FP8, block scales and incoherent processing": dict(fp8="quantize", fp8_incoherent_seed=0),
    "FP8, block scales": dict(fp8="quantize", fp8_incoherent_seed=None),
}


def trained(data: torch.Tensor, symbols: int, size: dict[str, int], batch: int, steps: int) -> GPT:
    torch.manual_seed(1337)
    model = GPT(symbols, **size).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    compiled = torch.compile(model, backend="fa3_inductor")
    for step in range(steps):
        at = torch.randint(len(data) - size["context"] - 1, (batch,))
        tokens, targets = (torch.stack([data[i + j : i + j + size["context"]] for i in at]).to(DEVICE) for j in (0, 1))
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = compiled(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def perplexity(model: GPT, data: torch.Tensor, context: int, settings: dict) -> float:
    """Of ``data`` in pieces of ``context`` characters."""
    torch.compiler.reset()
    fa3_inductor.clear_reports()
    compiled = torch.compile(model, backend="fa3_inductor", options={"target": TARGET, **settings})
    pieces = data[: (len(data) - 1) // context * context].view(-1, context)
    after = data[1:][: pieces.numel()].view(-1, context)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        loss = compiled(pieces.to(DEVICE), after.to(DEVICE)).item()
    seen = {site.dtype for site in fa3_inductor.reports().sites}
    assert seen == {"bfloat16" if settings["fp8"] == "off" else "float8_e4m3fn"}, fa3_inductor.reports()
    return math.exp(loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="training steps (default: 1500)")
    steps = parser.parse_args().steps
    size = dict(SIZE)
    batch, _ = size.pop("batch"), size.pop("steps")
    text = TEXT.read_text()
    symbols = sorted(set(text))
    data = torch.tensor([symbols.index(ch) for ch in text])
    held_out = len(data) // 10
    model = trained(data[:-held_out], len(symbols), size, batch, steps)
    print(f"\nperplexity of {held_out} held-out characters, attention in")
    for name, settings in SETTINGS.items():
        print(f"{name:>44}  {perplexity(model, data[-held_out:], size['context'], settings):.4f}", flush=True)


if __name__ == "__main__":
    main()

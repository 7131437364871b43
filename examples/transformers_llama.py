"""transformers' Llama with attn_implementation="eager": what fa3_inductor makes of it, and that the numbers stay.

Run: python examples/transformers_llama.py

The model is small and has random weights, so nothing is downloaded. It runs once for inference and once for a training
step, uncompiled and compiled with fa3_inductor; in float32 on a CPU, in bfloat16 on a GPU.
"""

import copy

import torch

import fa3_inductor

try:
    from transformers import LlamaConfig, LlamaForCausalLM
except ImportError:
    raise SystemExit('this example needs transformers: pip install "fa3-inductor[models]"') from None

# Eager bfloat16 itself is this far from exact: a few of its rounding steps at the size of the numbers compared.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative to the largest number, so that it says the same about logits and gradients."""
    return ((a - b).abs().max() / b.abs().max()).item()


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    eager = LlamaForCausalLM(config).to(device, dtype)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="fa3_inductor")
    tokens = torch.randint(config.vocab_size, (2, 256), device=device)
    differences = {}

    eager.eval(), model.eval()
    with torch.no_grad():
        differences["logits"] = largest_difference(
            compiled(tokens, use_cache=False).logits, eager(tokens, use_cache=False).logits
        )

    eager.train(), model.train()
    losses = [m(tokens, labels=tokens, use_cache=False).loss for m in (compiled, eager)]
    for loss in losses:
        loss.backward()
    differences["loss"] = largest_difference(*losses)
    differences["gradients"] = max(
        largest_difference(p.grad, q.grad) for p, q in zip(model.parameters(), eager.parameters(), strict=True)
    )

    report = fa3_inductor.reports()
    print(report)
    print(f"\nlargest relative differences to the uncompiled model, {dtype}:")
    for name, value in differences.items():
        print(f"  {name:<10}{value:.1e}")
    if report.rejected or not report.fused:
        raise SystemExit("an attention was not fused: the report above says why")
    if not all(value < TOLERANCE[dtype] for value in differences.values()):
        raise SystemExit(f"a difference is larger than {TOLERANCE[dtype]}, which rounding does not explain")


if __name__ == "__main__":
    main()

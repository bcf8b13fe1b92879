"""A small decoder-only transformer that classifies token sequences, its attention computed by theria.

    python examples/minimal_decoder_transformer.py                                # the fused kernels, on a GPU
    python examples/minimal_decoder_transformer.py --backend reference --device cpu --steps 5

Pre-norm blocks, causal attention; the last token, the only one that sees the whole sequence, is classified. Weights
and data are drawn on the CPU by seeded generators and then moved, so every backend and device computes with the same
numbers and their losses can be compared line by line.

Shapes: B sequences, N tokens, C width, H heads, D = C / H.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from theria.attention.custom import sdpa_custom
from theria.ops.capabilities import interpreted

FUSED = ("triton_full_fused", "triton")
BACKENDS = (*FUSED, "custom", "reference")
MAX_FUSED_HEAD_DIM = 256  # a row of q, k and v has to fit the registers of one program


class LimitError(ValueError):
    """A command line that cannot run; the text names the limit and what to do."""


class CausalSelfAttention(nn.Module):
    """(B, N, C) -> (B, N, C)."""

    def __init__(self, d_model: int, n_heads: int, backend: str) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.backend = backend
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, trace: Trace) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # 3 of (B, H, N, D)
        trace("q, k, v", q)
        heads = sdpa_custom(q, k, v, is_causal=True, backend=self.backend)
        trace("attention", heads)
        return self.out(heads.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)); (B, N, C) -> (B, N, C)."""

    def __init__(self, d_model: int, n_heads: int, d_ff: int, backend: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention = CausalSelfAttention(d_model, n_heads, backend)
        self.mlp = nn.Sequential(nn.Linear(d_model, d_ff), nn.GELU(), nn.Linear(d_ff, d_model))

    def forward(self, x: Tensor, trace: Trace) -> Tensor:
        x = x + self.attention(self.norm1(x), trace)
        x = x + self.mlp(self.norm2(x))
        trace("block", x)
        return x


class Decoder(nn.Module):
    """Tokens (B, N), int64 -> logits (B, num_classes)."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        width = options.d_model
        self.tokens = nn.Embedding(options.vocab_size, width)
        self.positions = nn.Parameter(0.02 * torch.randn(options.seq_len, width))
        self.blocks = nn.ModuleList(
            Block(width, options.n_heads, options.d_ff, options.backend) for _ in range(options.n_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, options.num_classes)

    def forward(self, tokens: Tensor, trace: Trace) -> Tensor:
        trace("tokens", tokens)
        x = self.tokens(tokens) + self.positions
        trace("embedded", x)
        for block in self.blocks:
            x = block(x, trace)
        last = self.norm(x[:, -1])
        trace("last token", last)
        logits = self.head(last)
        trace("logits", logits)
        return logits


class Trace:
    """Prints the shape of each stage while it is `on`."""

    def __init__(self, on: bool) -> None:
        self.on = on

    def __call__(self, stage: str, x: Tensor) -> None:
        if self.on:
            print(f"  shape  {stage:<12} {tuple(x.shape)}")


def batches(options: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (tokens (B, N), labels (B,)), both int64 on the CPU, the same for the same seed.

    Without `--use-synthetic-task`: one batch of random tokens and labels, repeated, to be learned by heart. With it: a
    new batch each step whose label is the first token modulo `num_classes`, which only attention brings to the last.
    """
    generator = torch.Generator().manual_seed(options.seed)
    shape = (options.batch_size, options.seq_len)
    tokens = torch.randint(options.vocab_size, shape, generator=generator)
    labels = torch.randint(options.num_classes, shape[:1], generator=generator)
    while True:
        if options.use_synthetic_task:
            tokens = torch.randint(options.vocab_size, shape, generator=generator)
            labels = tokens[:, 0] % options.num_classes
        yield tokens, labels


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS, default="triton_full_fused", help="how attention is computed")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu, ...")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    parser.add_argument("--verbose", action="store_true", help="print shapes and the norm of every gradient")
    parser.add_argument("--d_model", type=int, default=64, help="width C")
    parser.add_argument("--n_heads", type=int, default=4, help="heads H; must divide d_model")
    parser.add_argument("--n_layers", type=int, default=2, help="blocks")
    parser.add_argument("--d_ff", type=int, default=256, help="hidden width of a block's mlp")
    parser.add_argument("--seq_len", type=int, default=32, help="tokens N of a sequence")
    parser.add_argument("--batch_size", type=int, default=16, help="sequences B of a batch")
    parser.add_argument("--vocab_size", type=int, default=64, help="distinct tokens")
    parser.add_argument("--num_classes", type=int, default=4, help="distinct labels")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of AdamW")
    parser.add_argument(
        "--use-synthetic-task", action="store_true", help="labels that attention can learn, new batches"
    )
    return parser.parse_args(arguments)


def check_limits(options: argparse.Namespace) -> torch.device:
    """The device, once every limit is met.

    Raises:
        LimitError: With the first limit that is not.
    """
    sizes = ("steps", "d_model", "n_heads", "n_layers", "d_ff", "seq_len", "batch_size", "vocab_size", "num_classes")
    for name in sizes:
        if getattr(options, name) < 1:
            raise LimitError(f"--{name} {getattr(options, name)}: must be at least 1.")
    if options.lr <= 0:
        raise LimitError(f"--lr {options.lr}: must be above 0.")
    if options.d_model % options.n_heads:
        raise LimitError(f"--d_model {options.d_model} is not divisible by --n_heads {options.n_heads}.")
    fused, head_dim = options.backend in FUSED, options.d_model // options.n_heads
    if fused and head_dim > MAX_FUSED_HEAD_DIM:
        raise LimitError(
            f"--d_model {options.d_model} / --n_heads {options.n_heads} gives a head dim of {head_dim}; the fused "
            f"backend takes at most {MAX_FUSED_HEAD_DIM}. Use more heads, or --backend custom, which has no limit."
        )
    try:
        device = torch.device(options.device)
    except RuntimeError:
        raise LimitError(f"--device {options.device}: not a device. Use cuda, cuda:0 or cpu.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LimitError(
            f"--device {options.device}: this machine has {torch.cuda.device_count()} CUDA devices that torch "
            f"{torch.__version__} can use. Run on the CPU with --backend reference --device cpu."
        )
    if fused and device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        raise LimitError(
            f"--backend {options.backend} runs on CUDA, not on {device.type}. Use --backend reference --device cpu. "
            "(TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests.)"
        )
    return device


def train(options: argparse.Namespace, device: torch.device) -> None:
    """AdamW on the cross-entropy; prints the loss before each step."""
    torch.manual_seed(options.seed)
    model = Decoder(options).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    print(f"backend {options.backend}  device {device}  parameters {sum(p.numel() for p in model.parameters())}")
    for step, (tokens, labels) in zip(range(options.steps), batches(options), strict=False):
        logits = model(tokens.to(device), Trace(options.verbose and step == 0))
        loss = F.cross_entropy(logits, labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        print(f"step {step:4d}  loss {loss.item():.8f}")
        if options.verbose:
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                print(f"  gradient norm  {name:<32} {parameter.grad.norm().item():.6e}")
        optimizer.step()


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        train(options, check_limits(options))
    except (LimitError, NotImplementedError, ImportError) as error:  # the last two: the backend's own limits
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

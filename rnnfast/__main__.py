"""``python -m rnnfast``: what is here, and does it work."""

from __future__ import annotations

import platform
import sys

import torch

import rnnfast

from . import _cuda, engine

_PAIRS: tuple[tuple[str, dict[str, object]], ...] = (
    ("LSTM", {}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    ("LSTM", {"proj_size": 5}),
    ("GRU", {}),
    ("RNN", {"nonlinearity": "tanh"}),
    ("RNN", {"nonlinearity": "relu"}),
)


def _worst(name: str, options: dict[str, object], dtype: torch.dtype, device: str) -> float:
    """Largest difference from torch.nn of outputs and gradients, relative to their size."""
    plain = getattr(torch.nn, name)(17, 33, dtype=dtype, device=device, **options)
    fast = getattr(rnnfast, name)(17, 33, dtype=dtype, device=device, **options)
    fast.load_state_dict(plain.state_dict())
    found = []
    x = torch.randn(7, 3, 17, dtype=dtype, device=device)
    for layer in (plain, fast):
        leaf = x.clone().requires_grad_()
        output, state = layer(leaf)
        parts = [output, *(state if isinstance(state, tuple) else (state,))]
        sum((part * part).sum() for part in parts).backward()
        found.append([*parts, leaf.grad, *(p.grad for p in layer.parameters())])
    return max(
        float(((a - b).abs().max() / a.abs().max()).detach()) for a, b in zip(*found, strict=True)
    )


def main() -> int:
    """Print versions, engines and a quick comparison with torch.nn; 0 if all agree."""
    print(f"rnnfast   {rnnfast.__version__}")
    print(f"torch     {torch.__version__}")
    print(f"python    {platform.python_version()} on {platform.platform()}")
    print(f"cpu isa   {engine.active_isa()} (here: {', '.join(engine.available_isas())})")
    print(f"threads   {torch.get_num_threads()}")
    why = _cuda.why_not()
    print(f"cuda      {why or torch.cuda.get_device_name()}")
    print(f"engines   {', '.join(rnnfast.engines())}")
    print("self-check against torch.nn, outputs and gradients:")
    good = True
    torch.manual_seed(0)
    kinds = [("cpu", torch.float32, 1e-4), ("cpu", torch.float64, 1e-10)]
    if not why:  # torch allows TF32 there
        kinds += [("cuda", torch.float32, 1e-2), ("cuda", torch.float64, 1e-10)]
    for device, dtype, limit in kinds:
        for name, options in _PAIRS:
            try:
                worst = _worst(name, options, dtype, device)
                ok = worst <= limit
                text = f"{worst:.1e}"
            except Exception as error:  # the check is there to report it
                ok, text = False, f"{type(error).__name__}: {error}"
            good &= ok
            told = ", ".join(f"{key}={value}" for key, value in options.items())
            label = f"{device} {name}({told}) {str(dtype).removeprefix('torch.')}"
            print(f"  {'ok  ' if ok else 'FAIL'}  {label:<66} {text}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

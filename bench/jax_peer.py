"""JAX: lax.scan under jit, the input projection hoisted, the weights transposed beforehand."""

from __future__ import annotations

from typing import Any

import numpy as np

from .peers import CantRun, Peer, need
from .problem import Results


class Jax(Peer):
    """Inference and training (vjp with respect to x and all weights); compilation is not timed.

    XLA sizes its thread pool by the CPUs of the process, which `python -m bench` restricts.
    """

    name = "jax"
    package = "jax"
    cells = ("lstm", "gru", "rnn", "indrnn")

    def build(self, threads: int) -> None:
        jax, jnp = need("jax"), need("jax.numpy")
        problem, shape = self.problem, self.problem.shape
        if shape.packed and shape.bidirectional:
            raise CantRun("no packed both ways")
        mask = jnp.asarray(problem.mask.numpy())[..., None] if shape.packed else None
        two_states = shape.cell == "lstm"

        def cell(gx: Any, state: Any, w_hh: Any, b_hh: Any) -> Any:
            h = state[0]
            if shape.cell == "indrnn":
                return (jax.nn.relu(gx + w_hh * h + b_hh),)
            gh = h @ w_hh + b_hh
            if shape.cell == "rnn":
                return (jnp.tanh(gx + gh),)
            if shape.cell == "lstm":
                i, f, g, o = jnp.split(gx + gh, 4, axis=-1)
                c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
                return jax.nn.sigmoid(o) * jnp.tanh(c), c
            rx, zx, nx = jnp.split(gx, 3, axis=-1)
            rh, zh, nh = jnp.split(gh, 3, axis=-1)
            r, z = jax.nn.sigmoid(rx + rh), jax.nn.sigmoid(zx + zh)
            n = jnp.tanh(nx + r * nh)
            return ((1 - z) * n + z * h,)

        def layer(weights: Any, tail: str, x: Any, state: Any, backwards: bool) -> Any:
            w_hh, b_hh = weights[f"weight_hh_{tail}"], weights[f"bias_hh_{tail}"]
            gates = x @ weights[f"weight_ih_{tail}"] + weights[f"bias_ih_{tail}"]

            def step(state: Any, now: Any) -> Any:
                if mask is None:
                    new = cell(now, state, w_hh, b_hh)
                    return new, new[0]
                gx, valid = now
                new = cell(gx, state, w_hh, b_hh)
                kept = tuple(jnp.where(valid, a, b) for a, b in zip(new, state, strict=True))
                return kept, jnp.where(valid, new[0], 0)

            steps = gates if mask is None else (gates, mask)
            return jax.lax.scan(step, state, steps, reverse=backwards)

        def forward(weights: Any, x: Any, state: Any) -> Any:
            ends = []
            for k in range(shape.layers):
                sides = []
                for d in range(shape.directions):
                    index = k * shape.directions + d
                    start = tuple(part[index] for part in state)
                    end, y = layer(weights, f"l{k}" + "_reverse" * d, x, start, d == 1)
                    sides.append(y)
                    ends.append(end)
                x = jnp.concatenate(sides, -1) if len(sides) > 1 else sides[0]
            return x, tuple(jnp.stack(part) for part in zip(*ends, strict=True))

        def train(weights: Any, x: Any, state: Any, dy: Any) -> Any:
            y, pull = jax.vjp(lambda w, v: forward(w, v, state)[0], weights, x)
            return y, *pull(dy)

        # ascontiguousarray: (I, G*H), the layout in which a JAX model would hold them
        weights = {
            name: jnp.asarray(np.ascontiguousarray(value.numpy().T))
            for name, value in problem.weights.items()
        }
        x = jnp.asarray(problem.x.numpy())
        starts = (problem.h0, problem.c0) if two_states else (problem.h0,)
        state = tuple(jnp.asarray(part.numpy() * problem.has_state) for part in starts)
        if shape.mode == "training":
            dy = jnp.asarray(problem.dy.numpy())
            run = jax.jit(train).lower(weights, x, state, dy).compile()
            self.call = lambda: jax.block_until_ready(run(weights, x, state, dy))
        else:
            run = jax.jit(forward).lower(weights, x, state).compile()
            self.call = lambda: jax.block_until_ready(run(weights, x, state))

    def results(self) -> Results:
        out = self.call()
        if self.problem.shape.mode != "training":
            y, ends = out
            found = {"y": np.asarray(y)}
            found |= {name: np.asarray(v) for name, v in zip(("h_n", "c_n"), ends, strict=False)}
            return found
        y, gradients, dx = out
        found = {"y": np.asarray(y), "dx": np.asarray(dx)}
        return found | {f"d{name}": np.asarray(value).T for name, value in gradients.items()}

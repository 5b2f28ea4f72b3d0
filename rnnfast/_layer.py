"""What the layers of lstm.py, gru.py, rnn.py and scan_layers.py share: call, freezing, copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from . import _heads, _norm, _parameters, _regularize, _run, _step
from ._checks import check_recompute
from ._freeze import Frozen, why_not
from ._step_plan import StepPlan
from .cells import CellSpec, cell_spec, chosen_cell, may_zone_out, zoneout_cell

if TYPE_CHECKING:
    from typing_extensions import Self

SPECS: dict[str, CellSpec] = {
    "LSTM": cell_spec("lstm"),
    "GRU": cell_spec("gru"),
    "RNN_TANH": cell_spec("rnn_tanh"),
    "RNN_RELU": cell_spec("rnn_relu"),
    "INDRNN_TANH": cell_spec("indrnn_tanh"),
    "INDRNN_RELU": cell_spec("indrnn_relu"),
    "MIN_GRU": cell_spec("min_gru"),
    "MIN_GRU_LINEAR": cell_spec("min_gru_linear"),
    "MIN_LSTM": cell_spec("min_lstm"),
    "MIN_LSTM_LINEAR": cell_spec("min_lstm_linear"),
    "SLSTM": cell_spec("slstm"),
    "SLSTM_EXP": cell_spec("slstm_exp"),
    "QRNN_F": cell_spec("qrnn_f"),
    "QRNN_FO": cell_spec("qrnn_fo"),
    "QRNN_IFO": cell_spec("qrnn_ifo"),
    "SRU": cell_spec("sru"),
}


def spec_of(layer: nn.Module) -> CellSpec:
    """The cell of a layer."""
    spec = getattr(layer, "_chosen_cell", None) or SPECS[layer.mode]  # type: ignore[index]
    # any value but 0, which a call checks
    return zoneout_cell(spec) if layer.__dict__.get("zoneout") else spec


_TEXTS = {
    "coupled_lstm": ", coupled=True",
    "peephole_lstm": ", peephole=True",
    "gru_before": ", reset_after=False",
}
_TEXTS |= {f"{kind}_norm": ", layer_norm=True" for kind in ("lstm", "gru", "rnn", "indrnn")}


def text_of_cell(layer: nn.Module) -> str:
    """What was chosen, as the constructor takes it."""
    spec: Any = layer._chosen_cell
    if spec is None:
        return ""
    plain, text = CellSpec("", 0, 0, 0, 0), _TEXTS.get(spec.name, "")
    if spec.activation != ("relu" if spec.name == "indrnn_norm" else plain.activation):
        text += f", activation={spec.activation}"
    if spec.gate_activation != plain.gate_activation and spec.gates > 1:
        text += f", gate_activation={spec.gate_activation}"
    text += f", cell_clip={spec.clip:g}" if spec.clip else ""
    return text + (f", num_heads={spec.heads}" if spec.heads > 1 else "")


def no_proj_size(kwargs: dict[str, Any], name: str) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
    for key in kwargs:
        raise TypeError(f"{name}.__init__() got an unexpected keyword argument '{key}'")


# nn.RNNBase and not nn.LSTM: torch.compile refuses every subclass of nn.LSTM, nn.GRU and nn.RNN
class Layer(nn.RNNBase):
    """What the layers share."""

    _frozen: Frozen | None = None
    _chosen_cell: CellSpec | None = None  # where activations, a bound or heads were chosen
    #: Whether forward keeps only the states every 64 steps for backward, which computes the gates
    #: between them anew. May be set at any time, and holds from the next call on.
    recompute: bool = False

    #: Probability of an entry of the recurrent weights being zero for a call, and of a feature of a
    #: layer's input being zero for a sequence, in training. May be set at any time, as dropout.
    weight_dropout: float = 0.0
    input_dropout: float = 0.0
    #: Probability of a feature of h being zero on its way into W_hh for a sequence, in training;
    #: and of an entry of the states staying as it was at a step (a pair: of h and of c), which is
    #: expected in eval. May be set at any time.
    recurrent_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    #: Whether the output is that of the last step only. May be set at any time.
    return_last: bool = False
    residual: bool = False
    layer_norm: bool = False

    def _choose(self, kind: str, *options: Any) -> None:
        spec = chosen_cell(type(self).__name__.removeprefix("Lazy"), kind, *options)
        if spec.options:
            self._chosen_cell = spec

    def _set_heads(self, num_heads: int, device: Any) -> None:
        """Of a layer that torch.nn has made on the meta device: the real weights."""
        self._chosen_cell = replace(spec_of(self), heads=num_heads)
        for name in self._flat_weights_names:
            w = getattr(self, name)
            rows, *columns = w.shape
            if name.startswith("weight_hh"):
                columns = [self.hidden_size // num_heads]
            setattr(
                self, name, Parameter(torch.empty(rows, *columns, device=device, dtype=w.dtype))
            )
        self._init_flat_weights()
        self.reset_parameters()

    def _nonlinearity(
        self, kind: str, nonlinearity: str, activation: str | None, layer_norm: bool
    ) -> str:
        """torch.nn's argument; an activation that torch.nn has not is chosen."""
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        self.activation = nonlinearity if activation is None else activation
        name = type(self).__name__.removeprefix("Lazy")
        kind = _norm.kind_of(name, kind, kind, layer_norm)
        if activation is None:
            if layer_norm:
                self._choose(kind, nonlinearity)
            return nonlinearity
        self._choose(kind, activation)
        return "tanh" if self._chosen_cell else activation

    def _set_options(self, recompute: bool, *options: Any) -> None:
        name = type(self).__name__
        check_recompute(name, recompute)
        if recompute:  # else the class says it
            self.recompute = True
        spec = spec_of(self)
        given = _regularize.Options(*options)
        checked = _regularize.check(name, given, spec.states)
        if checked.zoneout and self.proj_size:
            raise ValueError(
                f"rnnfast: zoneout of {name} has no form with a projection, got zoneout="
                f"{given.zoneout!r} and proj_size={self.proj_size}"
            )
        for option, fits in (
            ("zoneout", may_zone_out(spec)),
            ("recurrent_dropout", spec.dense and not spec.stages),
        ):
            if getattr(checked, option) and not fits:
                cell = text_of_cell(self).removeprefix(", ") or f"the cell {spec.name}"
                raise ValueError(
                    f"rnnfast: {option} of {name} has no form with {cell}, "
                    f"got {option}={getattr(given, option)!r}"
                )
        for option, value in given._asdict().items():
            if value:
                setattr(self, option, value)

    # torch.nn keeps a list of the weights beside the parameters, and weak references to them. Here
    # there is neither: a list gets old, and holds computed weights that can't be copied;
    # torch.utils.swap_tensors (load_state_dict under swap_module_params) refuses weak references.
    __setattr__ = nn.Module.__setattr__  # type: ignore[assignment]
    _replicate_for_data_parallel = nn.Module._replicate_for_data_parallel

    @property
    def _flat_weights(self) -> list[Any]:  # type: ignore[override]
        return [getattr(self, name, None) for name in self._flat_weights_names]

    def _init_flat_weights(self) -> None:
        self.__dict__.pop("_flat_weights", None)  # of torch.nn's layer that this one was
        self._flat_weight_refs = []

    def _update_flat_weights(self) -> None:
        pass

    def _weights(self) -> Sequence[Any]:
        # read at every call: functional_call, parametrizations and attributes may replace them
        try:
            parameters = self._parameters
            return [parameters[name] for name in self._flat_weights_names]
        except KeyError:
            return [getattr(self, name) for name in self._flat_weights_names]

    def _complete(self, weights: Sequence[Any]) -> Sequence[Any]:
        """The weights as a call takes them, w_ih, w_hh, b_ih, b_hh, of those that there are."""
        spec = self._chosen_cell
        if spec is None:
            return weights
        bias = self.bias
        if spec.parameters:
            weights, bias = _parameters.merge(spec, weights, len(self._all_weights), bias), True
        if spec.heads == 1:
            return weights
        return _heads.split(type(self).__name__, spec, weights, bias)

    def reset_parameters(self) -> None:
        """Draw the initial weights anew."""
        super().reset_parameters()
        _norm.reset(self)

    def _current(self) -> tuple[Sequence[Any], Sequence[Tensor] | None]:
        """The weights of this call, and their packed form if the layer is frozen."""
        frozen = self._frozen
        if frozen is None or torch.compiler.is_compiling():
            # a frozen layer's checks of memory and versions can't be traced
            return self._complete(self._weights()), None
        return frozen.arguments, frozen.packed(self._parameters, spec_of(self))

    def _step_plan(self) -> StepPlan | None:
        frozen = self._frozen
        if frozen is None:
            return None
        spec = spec_of(self)
        if spec.heads > 1 or spec.states > 2:
            return None
        frozen.packed(self._parameters, spec)  # or an error: other weights, another cell
        return frozen.step_plan()

    def forward(
        self, input: Any, hx: Any = None, reset: Any = None, lengths: Any = None, mask: Any = None
    ) -> tuple[Any, Any]:
        """Run the layer.

        Args:
            input: the sequence, a tensor or a :class:`torch.nn.utils.rnn.PackedSequence`
            hx: initial state; zeros if ``None``
            reset: bool, true at the first step of each new sequence: zeros enter that step in place
                of the state before it (or of ``hx``), and no gradient leaves it backwards. The
                second direction of a bidirectional layer is cut between the same two steps. For
                packed input a :class:`~torch.nn.utils.rnn.PackedSequence` packed in the same way,
                or its ``data``
            lengths: number of valid steps of each row of padded, batched input, an integer tensor
                in any order. Output and gradients are zero behind them, the final state is that of
                a row's last valid step, and the second direction begins there; what stands in the
                padding is never read. As packing with ``enforce_sorted=False`` and padding again,
                but it can be compiled and exported, too. On a GPU each call waits for them
            mask: bool, true at the valid steps of padded input, in place of lengths: padding on
                either side, holes, rows without any valid step. The other steps are skipped: the
                state passes them unchanged, output and gradients there are zero, and what stands
                there is never read. A reset at such a step holds for the next valid one of its row

        Shape: as in the class; reset and mask have that of input without the features, lengths
        :math:`(B)`.

        Raises:
            RuntimeError: lengths of another shape or dtype, below 1 or above T (in a graph when it
                runs), or with packed or unbatched input; a mask of another shape, dtype or device,
                or with lengths or packed input; and what the class says

        Example::

            >>> done = torch.rand(5, 3) < 0.1              # (T, B): which steps begin an episode
            >>> output, state = layer(torch.randn(5, 3, 10), reset=done)
            >>> output, state = layer(torch.randn(5, 3, 10), lengths=torch.tensor([2, 5, 1]))
            >>> output, state = layer(torch.randn(5, 3, 10), mask=torch.rand(5, 3) < 0.8)
        """
        return _run.of_module(
            type(self).__name__, spec_of(self), self, input, hx, reset, lengths, mask
        )

    def step(self, input: Any, state: Any = None, reset: Any = None) -> tuple[Any, Any]:
        r"""Run one step, for streams whose next input is not known yet.

        The same as :meth:`forward` on a sequence of one step, without the dimension of time and
        with less overhead. Gradients flow through it. Hooks of the module do not run.

        Args:
            input: features of this step
            state: as the call before returned it; zeros if ``None``
            reset: bool, true where a new sequence begins with this step: zeros enter in place of
                ``state``

        Shape:
            - input: :math:`(B, I)` or :math:`(I)`
            - state: as ``hx`` of :meth:`forward`, :math:`(L, B, H)` or :math:`(L, H)`, a tuple
              where a layer has several states
            - reset: :math:`(B)`, or a bool for unbatched input
            - output: :math:`(B, P)` or :math:`(P)`, :math:`P` = proj_size or hidden_size

        Returns:
            ``(output, state)``

        Raises:
            RuntimeError: a bidirectional layer, whose second direction begins at the end of the
                sequence; ``weight_dropout``, ``input_dropout`` or ``recurrent_dropout`` in
                training, which have one mask a sequence; a shape, dtype or device that does not fit

        Example::

            >>> layer, state = rnnfast.GRU(10, 20).eval().freeze(), None
            >>> with torch.inference_mode():
            ...     for x in stream:                       # each (B, 10)
            ...         y, state = layer.step(x, state)
        """
        return _step.step(self, spec_of(self), input, state, reset)

    def extra_repr(self) -> str:
        """What differs from a default; torch.nn's text, and what torch.nn has not."""
        text = super().extra_repr()
        usual = "relu" if self.mode.startswith("IND") else "tanh"
        nonlinearity = getattr(self, "nonlinearity", usual)
        if nonlinearity != usual and self._chosen_cell is None:
            text += f", nonlinearity={nonlinearity}"
        text += text_of_cell(self)
        if self.recompute:
            text += ", recompute=True"
        text += _regularize.text(self)
        return text if self._frozen is None else f"{text}, frozen=True"

    def flatten_parameters(self) -> None:
        """Do nothing; every parameter keeps storage of its own.

        So weights can be tied, sharded and saved by safetensors. Kept because code written
        for torch.nn calls it.
        """

    def freeze(self) -> Self:
        """Pack the weights once, for inference, and keep the packed copy until :meth:`unfreeze`.

        Without it each call packs anew where that pays, because weights may change between
        calls. The packed copy costs about the memory of the weights; ``state_dict`` and
        pickles do not contain it, and a copy of a frozen layer packs its own. Graphs of
        torch.compile and torch.export do not use it.

        .. warning::
            Writing through ``.data`` (``layer.weight_hh_l0.data.mul_(2)``) or NumPy leaves no trace
            to be checked: the layer goes on with the old weights. Write under ``torch.no_grad()``,
            which is noticed, or call :meth:`freeze` again.

        Returns:
            the layer itself

        Raises:
            RuntimeError: if the weights are no parameters (parametrized, say), or not float32,
                float64, bfloat16 or float16 on the CPU. A call of the frozen layer raises it if
                gradients are needed, or if a weight was replaced or changed since (then
                :meth:`freeze` or :meth:`unfreeze`)

        Example::

            >>> layer.eval().freeze()
            >>> with torch.inference_mode():
            ...     y, state = layer(x)
        """
        spec = spec_of(self)
        count = self.num_layers * (2 if self.bidirectional else 1) * spec.heads
        self._frozen = Frozen(
            spec, self._parameters, self._flat_weights_names, count, self._complete
        )
        return self

    def unfreeze(self) -> Self:
        """Drop what :meth:`freeze` kept; the layer computes and trains as before.

        Returns:
            the layer itself
        """
        self._frozen = None
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # .to(), .double() and friends swap what lies under a parameter
        frozen = self._frozen is not None
        super()._apply(fn, recurse)
        if frozen:
            self.unfreeze()
            self._refreeze()
        return self

    def _refreeze(self) -> None:
        # a copy or a move must not fail over it
        if why_not(self._parameters, self._flat_weights_names) is None:
            self.freeze()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        # the packed weights belong to this process and these parameters; a copy packs its own
        if state.pop("_frozen", None) is not None:
            state["_refreeze"] = True
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        refreeze = state.pop("_refreeze", False)
        super().__setstate__(state)
        self._init_flat_weights()
        if refreeze:
            self._refreeze()

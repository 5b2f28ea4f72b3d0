"""A user's program as mypy --strict reads it: every public name, what calls give, and what they
refuse (an ignore that is not needed is an error, too). Nothing here is run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from typing_extensions import assert_type

import rnnfast

x = torch.randn(5, 3, 10)
lengths = torch.tensor([2, 5, 1])
packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
States = tuple[Tensor, Tensor]

# layers: what comes in comes out, and the state of the LSTM is a pair
lstm = rnnfast.LSTM(10, 20, 2, bidirectional=True, device="cpu", dtype=torch.float32)
assert_type(lstm(x), tuple[Tensor, States])
assert_type(lstm(packed), tuple[PackedSequence, States])
assert_type(lstm.forward(x, (x, x), reset=x[..., 0] > 0), tuple[Tensor, States])
assert_type(rnnfast.LSTM(10, 20, proj_size=4, recompute=True).step(x[0]), tuple[Tensor, States])
gru = rnnfast.GRU(10, 20, batch_first=True, recompute=True)
assert_type(gru(x, lengths=lengths), tuple[Tensor, Tensor])
assert_type(gru(packed, x), tuple[PackedSequence, Tensor])
assert_type(gru.step(x[0], reset=x[0, :, 0] > 0), tuple[Tensor, Tensor])
assert_type(gru.eval().freeze(), rnnfast.GRU)
assert_type(gru.unfreeze(), rnnfast.GRU)
assert_type(gru.recompute, bool)
assert_type(rnnfast.RNN(10, 20, nonlinearity="relu")(x), tuple[Tensor, Tensor])
assert_type(rnnfast.IndRNN(10, 20)(x)[1], Tensor)
assert_type(gru(x, mask=x[..., 0] > 0), tuple[Tensor, Tensor])
regular = rnnfast.LSTM(10, 20, weight_dropout=0.5, input_dropout=0.4, forget_bias=1.0)
regular.weight_dropout, regular.return_last = 0.3, True
regular.recurrent_dropout, regular.zoneout = 0.2, (0.5, 0.05)
zoned = rnnfast.GRU(10, 20, recurrent_dropout=0.3, zoneout=0.1)
assert_type(rnnfast.LSTM(10, 20, zoneout=(0.5, 0.05)).zoneout, float | tuple[float, float])
deep = rnnfast.IndRNN(10, 20, 4, residual=True, return_last=True)
assert_type(deep.constrain_(784).init_memory_(784, epsilon=0.5), rnnfast.IndRNN)
chosen = rnnfast.LSTM(10, 20, activation="relu", gate_activation="hard_sigmoid", cell_clip=3.0)
peepholes = rnnfast.LSTM(10, 20, peephole=True)
assert_type((peepholes.peephole, rnnfast.LSTM(10, 20, coupled=True).coupled), tuple[bool, bool])
before = rnnfast.GRU(10, 20, reset_after=False)
assert_type(before.reset_after, bool)
assert_type(rnnfast.IndRNN(10, 20, layer_norm=True).layer_norm, bool)
assert_type((chosen.activation, chosen.cell_clip), tuple[str, float | None])
heads = rnnfast.GRU(10, 20, num_heads=4).num_heads + rnnfast.LSTM(10, 20, num_heads=4).num_heads
names: tuple[str, ...] = rnnfast.ACTIVATIONS
assert_type(rnnfast.RNN(10, 20, activation=names[3])(x), tuple[Tensor, Tensor])
assert_type(rnnfast.MinGRU(10, 20, nonlinearity="identity")(packed), tuple[PackedSequence, Tensor])
assert_type(rnnfast.SRU(10, 20, 2)(x)[1], tuple[Tensor, Tensor])
normed = rnnfast.BatchNormLSTM(10, 20, bidirectional=True, max_steps=5, momentum=0.2)
assert_type(normed(packed), tuple[PackedSequence, States])
assert_type(normed(x, (x, x), lengths=lengths), tuple[Tensor, States])
assert_type((normed.momentum, normed.max_steps), tuple[float, int])
assert_type(rnnfast.MinLSTM(10, 20, 2).step(x[0]), tuple[Tensor, Tensor])
FourStates = tuple[Tensor, Tensor, Tensor, Tensor]
slstm = rnnfast.SLSTM(10, 20, num_heads=4, forget="exp", return_last=True)
assert_type(slstm(packed, (x, x, x, x)), tuple[PackedSequence, FourStates])
assert_type(slstm.step(x[0]), tuple[Tensor, FourStates])
assert_type((slstm.forget, slstm.num_heads), tuple[str, int])
qrnn = rnnfast.QRNN(10, 20, kernel_size=3, pooling="ifo")(x, lengths=lengths)
assert_type(rnnfast.LazyLSTM(20)(x), tuple[Tensor, States])
assert_type(rnnfast.LazyGRU(20)(packed), tuple[PackedSequence, Tensor])
lazy: tuple[nn.RNNBase, ...] = (rnnfast.LazyRNN(20), rnnfast.LazyIndRNN(20))


def either(input: Tensor | PackedSequence) -> Tensor | PackedSequence:
    return lstm(input)[0]


# cells
assert_type(rnnfast.LSTMCell(10, 20)(x[0]), States)
assert_type(rnnfast.GRUCell(10, 20)(x[0], x[1]), Tensor)
assert_type(rnnfast.RNNCell(10, 20, nonlinearity="relu")(x[0]), Tensor)

# a layer of any cell, or of what makes one of layer and direction
recurrent = rnnfast.Recurrent(nn.GRUCell(10, 20), batch_first=True)
assert_type(recurrent(x, lengths=lengths), tuple[Any, Any])
assert_type(recurrent.step(x[0]), tuple[Any, Any])
made = rnnfast.Recurrent(lambda layer, direction: nn.GRUCell(10 if layer == 0 else 20, 20), 2)
loaded: type[rnnfast.LoadedLayer] = rnnfast.load_cell(
    "mgu.h", struct="Mgu", reference=max, cuda=False
)
assert_type(rnnfast.check_cell(loaded), dict[str, float])
of_header = loaded(10, 20, num_layers=2, bidirectional=True, residual=True)
assert_type(of_header(x, lengths=lengths), tuple[Tensor, Any])
assert_type(of_header.step(x[0]), tuple[Tensor, Any])
assert_type(of_header.spec.gates, int)
assert_type(loaded.functional(x, None, list(of_header.parameters())), tuple[Tensor, Any])
listed = rnnfast.Recurrent([nn.LSTMCell(10, 20), rnnfast.LSTMCell(20, 20)], num_layers=2)

# functions
weights = lstm.all_weights[0]
assert_type(rnnfast.functional.lstm(x, (x, x), weights, bidirectional=True), tuple[Tensor, States])
assert_type(rnnfast.functional.gru(packed, None, weights), tuple[PackedSequence, Tensor])
assert_type(rnnfast.functional.rnn_tanh(x, None, weights), tuple[Tensor, Tensor])
assert_type(rnnfast.functional.rnn(x, None, weights, activation="elu"), tuple[Tensor, Tensor])
assert_type(rnnfast.functional.indrnn(packed, None, weights), tuple[PackedSequence, Tensor])
assert_type(rnnfast.functional.gru(x, None, weights, recompute=True), tuple[Tensor, Tensor])
assert_type(
    rnnfast.functional.gru(x, None, weights, mask=x[..., 0] > 0, training=True, weight_dropout=0.5),
    tuple[Tensor, Tensor],
)
assert_type(
    rnnfast.functional.lstm(x, None, weights, zoneout=(0.5, 0.05), recurrent_dropout=0.3),
    tuple[Tensor, States],
)
assert_type(rnnfast.functional.gru(x, None, weights, num_heads=4), tuple[Tensor, Tensor])
assert_type(rnnfast.functional.rnn_relu(x, None, weights), tuple[Tensor, Tensor])
assert_type(rnnfast.functional.indrnn_tanh(x, None, weights), tuple[Tensor, Tensor])
assert_type(rnnfast.functional.indrnn_relu(x, None, weights), tuple[Tensor, Tensor])
assert_type(rnnfast.functional.linear_scan(x, x, x[0], reverse=True), Tensor)
assert_type(rnnfast.functional.min_gru(x, None, weights, nonlinearity="g"), tuple[Tensor, Tensor])
assert_type(rnnfast.functional.min_lstm(packed, x, weights), tuple[PackedSequence, Tensor])
assert_type(rnnfast.functional.slstm(x, None, weights, num_heads=2), tuple[Tensor, FourStates])
assert_type(rnnfast.functional.sru(x, None, weights), tuple[Tensor, States])
stats = [x, x]
assert_type(
    rnnfast.functional.batch_norm_lstm(
        packed, None, weights, stats, stats, bidirectional=True, training=True, momentum=0.2
    ),
    tuple[PackedSequence, States],
)
pooled = rnnfast.functional.qrnn(x, (x, x), weights, pooling="fo")
assert_type(rnnfast.functional.lstm_cell(x, (x, x), x, x), States)
assert_type(rnnfast.functional.gru_cell(x, x, x, x, x, x), Tensor)
assert_type(rnnfast.functional.rnn_tanh_cell(x, None, x, x), Tensor)
assert_type(rnnfast.functional.rnn_relu_cell(x, x, x, x), Tensor)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(10, 20)


# whole models keep their type
assert_type(rnnfast.accelerate(Model()), Model)
assert_type(rnnfast.restore(Model()), Model)
with rnnfast.patched():
    model = Model()
quantized: nn.Module = rnnfast.quantize(model, exclude=["head"])
kinds: tuple[type[nn.Module], ...] = (
    *(rnnfast.QuantizedLSTM, rnnfast.QuantizedGRU),
    *(rnnfast.QuantizedRNN, rnnfast.QuantizedIndRNN),
)

# streams
for output, _state in rnnfast.truncated(lstm, x, steps=2):
    assert_type(output, Tensor)
bytes_only: rnnfast.QuantizedLSTM = rnnfast.quantize(lstm)
assert_type(bytes_only.recompute, bool)
for output, _state in rnnfast.truncated(bytes_only, x, steps=2):
    assert_type(output, Tensor)
for output, _state in rnnfast.truncated(nn.GRU(10, 20), [x, x]):
    loss: Tensor = output.sum()

# engines
with rnnfast.use_engine("cpu", isa="portable", kernel="packed", split="serial"):
    assert_type(rnnfast.last_run(), dict[str, str | int | None])
assert_type(rnnfast.engines(), list[str])
explanation: rnnfast.Explanation = rnnfast.explain(model, x, seq_len=4)
assert_type(explanation.rows[0].engine, str)
assert_type(rnnfast.__version__, str)
translations = rnnfast.onnx_translations()

# what is wrong is found before it runs
rnnfast.LSTM("10", 20)  # type: ignore[arg-type]
rnnfast.GRU(10, 20, recompute=64)  # type: ignore[arg-type]
rnnfast.IndRNN(10, 20, proj_size=4)  # type: ignore[call-arg]
rnnfast.LSTM(10, 20, residual=True)  # type: ignore[call-arg]
rnnfast.GRU(10, 20, weight_dropout="0.5")  # type: ignore[arg-type]
rnnfast.GRU(10, 20, zoneout=(0.1, 0.1))  # type: ignore[arg-type]
lstm(x, x)  # type: ignore[arg-type]
gru(x, (x, x))  # type: ignore[arg-type]
slstm(x, (x, x))  # type: ignore[arg-type]
print(lstm(x)[1].shape)  # type: ignore[attr-defined]
rnnfast.Recurrent(3)  # type: ignore[arg-type]
rnnfast.accelerate(3)  # type: ignore[type-var]
rnnfast.truncated(lstm, x, 5, steps="2")  # type: ignore[arg-type]
rnnfast.truncated(nn.Linear(10, 20), x)  # type: ignore[arg-type]
rnnfast.functional.gru(x, None, weights, recompute=64)  # type: ignore[arg-type]
